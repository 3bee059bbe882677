"""Leases: many uses reserved at once, which an enclave then spends without asking for each.

    >>> LeaseRequest(b"token", b"invocation", bytes(32), bytes(32), bytes_out=256, uses=1)
    Traceback (most recent call last):
    isolate.errors.MalformedError: uses of message lease-request is 2 to 1024

Only where the owner's grant opts in (``VerifiedToken.lease``). Spec: docs/spec/service.md, 6.7.
"""

from __future__ import annotations

from typing import Annotated

from attrs import evolve, field, frozen

from isolate.crypto import cbor
from isolate.crypto.signing import Purpose, SigningKey
from isolate.errors import ReleaseRefused
from isolate.messages.attest import ServiceCertificate
from isolate.messages.base import Bytes32, Limit, Message
from isolate.messages.invoke import BytesOut

MAX_LEASE = 60  # seconds: for so long a revocation may go unnoticed
MAX_LEASED = 1024  # uses in one lease


@frozen
class LeaseRequest(Message):
    """Body of a Signed request by an enclave: the use that stands in it, and more like it, of the same bytes."""

    TYPE = "lease-request"
    token: bytes = field(repr=False)
    invocation: bytes = field(repr=False)
    channel_binding: Bytes32
    argument_hash: Bytes32
    bytes_out: BytesOut
    uses: Annotated[int, Limit(2, MAX_LEASED)]


@frozen
class Lease(Message):
    """The service's signature that so many uses, that of ``invocation`` (its id) among them, are durably spent."""

    TYPE = "lease"
    invocation: bytes
    uses: int
    bytes_out: int
    expires: int
    log_index: int
    time: int
    signature: bytes = field(default=b"", repr=False)

    def _signed(self) -> bytes:
        return cbor.encode([self.invocation, self.uses, self.bytes_out, self.expires, self.log_index, self.time])

    def sign(self, key: SigningKey) -> Lease:
        return evolve(self, signature=key.sign(Purpose.LEASE, self._signed()))

    def verify(self, certificate: ServiceCertificate, invocation: bytes, asked: LeaseRequest) -> None:
        """Raises ReleaseRefused unless the certified service signed it for this invocation (its id) and request."""
        same = (self.invocation, self.uses, self.bytes_out) == (invocation, asked.uses, asked.bytes_out)
        signed = certificate.release_key.verify(Purpose.LEASE, self._signed(), self.signature)
        if not (same and signed and self.expires <= self.time + MAX_LEASE):
            raise ReleaseRefused("the lease is not the service's, or for another use", code="receipt_refused")
