"""Using a handle: what a client sends an enclave over an attested channel, and the charge it makes.

    >>> Invoke(token=b"t", invocation=b"i", arguments={"image": b""}).encode()[:1].hex()
    'a4'

Spec: docs/spec/capability.md, and docs/spec/service.md, section 6.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve, field, frozen

from isolate.crypto import cbor
from isolate.crypto.signing import Purpose, SigningKey
from isolate.errors import ReleaseRefused
from isolate.messages.attest import ServiceCertificate
from isolate.messages.base import Message


def encode_argument(value: Any) -> Any:
    """How an argument travels: an array as its C-order little-endian bytes, the rest as it is.

    >>> import numpy as np
    >>> encode_argument(np.array([1, 2], "uint16")), encode_argument(3)
    (b'\\x01\\x00\\x02\\x00', 3)
    """
    array = getattr(value, "__array__", None)
    if array is None:
        return value
    import numpy as np

    numbers = np.ascontiguousarray(array())
    return numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes()


@frozen
class Invoke(Message):
    TYPE = "invoke"
    token: bytes = field(repr=False)
    invocation: bytes = field(repr=False)
    arguments: dict[str, Any] = field(repr=False)


BUCKET = (
    256  # bytes: replies are padded to a multiple, so that their length tells a result from a refusal to nobody
)


@frozen
class Reply(Message):
    """The answer to an Invoke: ``code`` is empty for a result, and then ``value`` is of the operation's type."""

    TYPE = "reply"
    code: str
    value: Any = field(repr=False)
    request_id: str
    padding: bytes = field(default=b"", repr=False)

    def padded(self) -> bytes:
        """The encoding, with padding up to the next multiple of BUCKET bytes.

        >>> [len(Reply("", value, "00" * 8).padded()) for value in (1, "a" * 150, bytes(200))]
        [256, 256, 512]
        """
        bare = evolve(self, padding=b"").encode()
        missing = -len(bare) % BUCKET
        # The head of the padding grows from one byte to two at 24; one byte short of a bucket cannot be reached.
        size = missing if missing < 24 else missing - 1 if missing > 24 else missing + BUCKET - 2
        return evolve(self, padding=bytes(size)).encode()


@frozen
class ChargeRequest(Message):
    """Body of a Signed request by an enclave: this use must be committed before its output leaves."""

    TYPE = "charge-request"
    token: bytes = field(repr=False)
    invocation: bytes = field(repr=False)
    channel_binding: bytes
    argument_hash: bytes
    bytes_out: int


@frozen
class Receipt(Message):
    """The service's signature that it has durably charged this invocation."""

    TYPE = "receipt"
    invocation: bytes
    log_index: int
    time: int
    signature: bytes = field(default=b"", repr=False)

    def _signed(self) -> bytes:
        return cbor.encode([self.invocation, self.log_index, self.time])

    @classmethod
    def make(cls, invocation: bytes, log_index: int, time: int, key: SigningKey) -> Receipt:
        unsigned = cls(invocation, log_index, time)
        return cls(invocation, log_index, time, key.sign(Purpose.RECEIPT, unsigned._signed()))

    def verify(self, certificate: ServiceCertificate, invocation: bytes) -> None:
        """Raises ReleaseRefused unless the certified service signed it for this invocation (its id)."""
        if self.invocation != invocation or not certificate.release_key.verify(
            Purpose.RECEIPT, self._signed(), self.signature
        ):
            raise ReleaseRefused("the receipt is not the service's, or for another use", code="receipt_refused")


@frozen
class BudgetRequest(Message):
    """Body of a Signed request by the holder of a token."""

    TYPE = "budget-request"
    token: bytes = field(repr=False)


@frozen
class Budget(Message):
    """What is left: the least over the handle and its ancestors. None is no limit."""

    TYPE = "budget"
    uses: int | None
    bytes_out: int | None
