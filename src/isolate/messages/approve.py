"""Export of plaintext: who may approve it, each approval, and the keys that go to the destination.

    >>> from isolate.crypto.kem import Identity
    >>> from isolate.crypto.signing import SigningKey
    >>> first, second, archive = SigningKey.generate(), SigningKey.generate(), Identity.generate().recipient
    >>> Approvers(2, [one.verifying_key.to_bytes() for one in (first, second)]).threshold
    2
    >>> wish = Wish("demo/1", "digits", bytes(32), archive.raw, "yearly archive")
    >>> Approval.make(wish, first, not_after=1_800_000_000, nonce=bytes(32)).check(wish)

An approval is made offline, by a key that nobody but its approver has. It says what may leave, to whom and why; it
is good once, at one service in one epoch, until ``not_after``. Spec: docs/spec/service.md, section 6.5.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Self

from attrs import evolve, field, frozen

from isolate.crypto import cbor
from isolate.crypto.kem import PUBLIC_SIZE, Recipient
from isolate.crypto.signing import Purpose, Signer, SigningKey, VerifyingKey, is_public_key
from isolate.errors import MalformedError, RefusedError, ReleaseRefused
from isolate.messages.attest import ServiceCertificate
from isolate.messages.base import MAX_LINE, Bytes32, Bytes64, Limit, Line, Message
from isolate.messages.owner import MAX_ASSET

MAX_APPROVERS = 16
MAX_REASON = 500  # characters: a line for the log
MAX_APPROVAL = MAX_LINE  # bytes encoded; a destination takes 1216 of them

Destination = Annotated[bytes, Limit(PUBLIC_SIZE, PUBLIC_SIZE)]
Asset = Annotated[str, Limit(1, MAX_ASSET)]
Reason = Annotated[str, Limit(1, MAX_REASON)]
Threshold = Annotated[int, Limit(2, MAX_APPROVERS)]
Keys = Annotated[list[Bytes64], Limit(2, MAX_APPROVERS)]
Approvals = Annotated[list[Annotated[bytes, Limit(1, MAX_APPROVAL)]], Limit(0, MAX_APPROVERS)]


@frozen
class Approvers(Message):
    """``threshold`` of these verifying keys (64 bytes each) must approve. Never one alone."""

    TYPE = "approvers"
    threshold: Threshold
    keys: Keys

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        # By the half that signs: with two names for one key, one person would count twice.
        signing = [key[:32] for key in self.keys]
        if len(set(signing)) != len(signing) or not all(is_public_key(one) for one in signing):
            raise MalformedError("approvers are different people, each with a usable key")
        if self.threshold > len(self.keys):
            raise MalformedError("more approvals are asked for than there are approvers")

    @property
    def digest(self) -> bytes:
        """SHA-256 of the encoding, 32 bytes: what an approval of a change names."""
        return hashlib.sha256(self.encode()).digest()


@frozen
class GroupApproval(Line):
    """One of the present approvers agrees that the group number ``sequence`` is the one with this digest."""

    TYPE = "group-approval"
    PREFIX = "isolate-group-approval-"
    WHAT = "approval"
    service: str
    sequence: int
    approvers: Bytes32
    not_after: int
    key: Bytes64
    signature: bytes = field(default=b"", repr=False)

    def _signed(self) -> bytes:
        return cbor.encode([self.service, self.sequence, self.approvers, self.not_after, self.key])

    @classmethod
    def make(cls, approvers: Approvers, signer: Signer, *, service: str, sequence: int, not_after: int) -> Self:
        """``service`` is its audience (name and epoch); ``sequence`` is one above the present group's."""
        made = cls(service, sequence, approvers.digest, not_after, signer.verifying_key.to_bytes())
        return evolve(made, signature=signer.sign(Purpose.GROUP_APPROVAL, made._signed()))

    def check(self, approvers: Approvers, *, service: str, sequence: int) -> None:
        """Raises RefusedError unless it is for this change, and signed by its key."""
        if (self.service, self.sequence, self.approvers) != (service, sequence, approvers.digest):
            raise RefusedError("this approval is for another change", code="approval_mismatch")
        key = VerifyingKey.from_bytes(self.key)
        if not key.verify(Purpose.GROUP_APPROVAL, self._signed(), self.signature):
            raise RefusedError("the signature of this approval does not verify", code="bad_signature")


@frozen
class SetApprovers(Message):
    """The owner names who approves exports; once there is a group, with its approvals (encoded) of the next."""

    TYPE = "set-approvers"
    threshold: Threshold
    keys: Keys
    approvals: Approvals

    @property
    def group(self) -> Approvers:
        """Raises MalformedError for what is no group."""
        return Approvers(self.threshold, self.keys)


@frozen
class GroupSet(Message):
    """The answer: ``sequence`` counts the groups from 1."""

    TYPE = "group-set"
    sequence: int
    log_index: int


@frozen
class Wish:
    """What is approved: the file with this digest, of this asset, for this destination, for this reason."""

    service: str
    asset: str
    digest: bytes
    destination: bytes
    reason: str

    def values(self) -> list[str | bytes]:
        return [self.service, self.asset, self.digest, self.destination, self.reason]


@frozen
class Approval(Line):
    """One approver's word. ``not_after`` is Unix seconds; ``nonce`` tells apart two that are otherwise alike."""

    TYPE = "approval"
    PREFIX = "isolate-approval-"
    WHAT = "approval"
    service: str
    asset: Asset
    digest: Bytes32
    destination: Destination = field(repr=False)
    reason: Reason
    not_after: int
    nonce: Bytes32 = field(repr=False)
    key: Bytes64
    signature: bytes = field(default=b"", repr=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _check_text(self.asset, self.reason)

    @property
    def wish(self) -> Wish:
        return Wish(self.service, self.asset, self.digest, self.destination, self.reason)

    def _signed(self) -> bytes:
        return cbor.encode([*self.wish.values(), self.not_after, self.nonce, self.key])

    @property
    def id(self) -> bytes:
        """What makes it good once, 32 bytes. The signature is no part of it."""
        return hashlib.sha256(b"isolate/v1/approval\0" + self._signed()).digest()

    @classmethod
    def make(cls, wish: Wish, signer: Signer, *, not_after: int, nonce: bytes) -> Self:
        """Sign one. Raises MalformedError for a wish that has not its form."""
        made = cls(
            wish.service, wish.asset, wish.digest, wish.destination, wish.reason, not_after, nonce,
            signer.verifying_key.to_bytes(),
        )  # fmt: skip
        return evolve(made, signature=signer.sign(Purpose.APPROVAL, made._signed()))

    def verifies(self) -> bool:
        """Whether its key signed it."""
        return VerifyingKey.from_bytes(self.key).verify(Purpose.APPROVAL, self._signed(), self.signature)

    def check(self, wish: Wish) -> None:
        """Raises RefusedError unless it is for this, and its key signed it. Whose key, the service knows."""
        if self.wish != wish:
            raise RefusedError(
                "this approval is for another asset, file, destination, reason or service", code="approval_mismatch"
            )
        if not self.verifies():
            raise RefusedError("the signature of this approval does not verify", code="bad_signature")


def _check_text(*texts: str) -> None:
    if not all(text.isprintable() for text in texts):
        raise MalformedError("an asset and a reason are printable characters on one line")


@frozen
class ExportRequest(Message):
    """Anyone who has the approvals may ask: the keys go to the destination that they name, and to nobody else."""

    TYPE = "export-request"
    asset: Asset
    digest: Bytes32
    destination: Destination = field(repr=False)
    reason: Reason
    nonce: Bytes32
    approvals: Approvals = field(repr=False)

    def wish(self, service: str) -> Wish:
        return Wish(service, self.asset, self.digest, self.destination, self.reason)


@frozen
class ExportContext(Message):
    """What an export means. ``approvals`` are the ids of those it used, ``log_index`` its place in the log."""

    TYPE = "export-context"
    service: str
    asset: str
    digest: bytes
    epoch: int
    compartments: list[str]
    destination: bytes
    reason: str
    nonce: bytes
    approvals: list[bytes]
    log_index: int
    time: int


@frozen
class Export(Message):
    """Keys for the destination: ``box`` is HPKE to it with ``context`` as info; the signature is over both."""

    TYPE = "export"
    context: bytes
    box: bytes
    signature: bytes = field(repr=False)

    @classmethod
    def make(cls, context: ExportContext, keys: dict[str, bytes], key: SigningKey) -> Self:
        info = context.encode()
        box = Recipient(context.destination).seal(cbor.encode(keys), info=info)
        return cls(info, box, key.sign(Purpose.RELEASE, cbor.encode(["export", info, box])))

    def verify(self, certificate: ServiceCertificate, request: ExportRequest) -> ExportContext:
        """The context, once signature and everything that was asked for hold. Raises ReleaseRefused."""
        signed = cbor.encode(["export", self.context, self.box])
        if not certificate.release_key.verify(Purpose.RELEASE, signed, self.signature):
            raise ReleaseRefused("the export is not signed by the certified service", code="service_uncertified")
        context = ExportContext.parse(self.context)
        asked = [*request.wish(certificate.audience).values(), request.nonce]
        if asked != [
            context.service, context.asset, context.digest, context.destination, context.reason, context.nonce,
        ]:  # fmt: skip
            raise ReleaseRefused("this export answers another request", code="release_mismatch")
        return context
