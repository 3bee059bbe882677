"""Who takes part in saving a checkpoint: the coordinator offers a key to seal to, and each side checks the other.

    >>> from isolate import Identity, SigningKey
    >>> from isolate.torch.checkpoint_parties import KeyParty, Offer
    >>> party = KeyParty(SigningKey.generate())
    >>> offer = Offer.make(party, bytes(16), Identity.generate().recipient, model_id="acme/run", epoch=3)
    >>> offer.verify(party, model_id="acme/run", epoch=3)

docs/spec/sealed-checkpoint.md, section 5. The plans and results of torch.distributed.checkpoint travel over the
process group, and are recorded by whoever can read it. So no key travels in them: the coordinator makes an identity
for this one checkpoint and offers its public half; the ranks seal to that.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

from attrs import field, frozen

from isolate.attestation import result as results
from isolate.attestation.evidence import KeyDigests
from isolate.channel.peers import check_pins
from isolate.crypto import cbor
from isolate.crypto.kem import Recipient
from isolate.crypto.signing import Purpose, SigningKey, VerifyingKey
from isolate.enclave.workload import Workload
from isolate.errors import (
    EvidenceRefused,
    HandshakeRefused,
    MalformedError,
    ResultRefused,
    UnauthenticatedOrigin,
    UsageError,
)

MAX_PROOF = 64_000  # bytes


class Party(Protocol):
    """One end of a save: it signs, and it knows whether another signer belongs to the same save."""

    @property
    def sign(self) -> SigningKey: ...

    def proof(self) -> bytes:
        """What shows another rank that the signing key belongs here: public, no key."""
        ...

    def check(self, signer: VerifyingKey, proof: bytes) -> None:
        """Raises UnauthenticatedOrigin unless this signer takes part in the same save."""
        ...


@frozen
class KeyParty:
    """Every rank holds the owner's signing key."""

    sign: SigningKey

    def proof(self) -> bytes:
        return b""

    def check(self, signer: VerifyingKey, proof: bytes) -> None:
        if signer != self.sign.verifying_key:
            raise UnauthenticatedOrigin("checkpoint: another key has signed what a rank sent", hint="")


@frozen
class WorkloadParty:
    """Every rank is an enclave with a key of its own: its result token says that it is one of the same job."""

    workload: Workload = field(repr=False)

    @property
    def sign(self) -> SigningKey:
        return self.workload.attested().sign

    def proof(self) -> bytes:
        return cbor.encode({"token": self.workload.token(), "keys": self.workload.keys.encode()})

    def check(self, signer: VerifyingKey, proof: bytes) -> None:
        expect = self.workload.expect(None)
        try:
            shown = cbor.record(proof, {"token": str, "keys": bytes}, max_size=MAX_PROOF)
            result = results.verify(
                shown["token"], issuer_key=expect.issuer_key, now=expect.clock(),
                INSECURE_accept_simulated=expect.INSECURE_accept_simulated,
            )  # fmt: skip
            keys = KeyDigests.parse(shown["keys"])
            if keys.digest != result.keys_digest:
                raise ResultRefused("the token is about other keys")
            keys.check("sign", signer.to_bytes())
            check_pins(result, expect)
        except (MalformedError, ResultRefused, EvidenceRefused, HandshakeRefused) as error:
            why = f"checkpoint: what a rank sent is not of an enclave of this job: {error.message}"
            raise UnauthenticatedOrigin(why, code=error.code, hint="") from None


def party_of(sign: SigningKey | Workload) -> KeyParty | WorkloadParty:
    """Raises UsageError."""
    if isinstance(sign, Workload):
        return WorkloadParty(sign)
    if isinstance(sign, SigningKey):
        return KeyParty(sign)
    raise UsageError("sign= takes a SigningKey or a Workload")


@frozen
class Offer:
    """What the coordinator sends with the plans: the checkpoint's id and the recipient that the ranks seal to."""

    id: bytes
    recipient: bytes
    signer: bytes
    signature: bytes = field(repr=False)
    proof: bytes = field(repr=False)

    @staticmethod
    def _message(id: bytes, recipient: bytes, model_id: str, epoch: int) -> bytes:
        fields: dict[str, Any] = {"id": id, "recipient": recipient, "model": model_id, "epoch": epoch}
        return cbor.encode(fields)

    @classmethod
    def make(cls, party: Party, id: bytes, recipient: Recipient, *, model_id: str, epoch: int) -> Self:
        sign = party.sign
        signature = sign.sign(Purpose.CHECKPOINT_OFFER, cls._message(id, recipient.raw, model_id, epoch))
        return cls(id, recipient.raw, sign.verifying_key.to_bytes(), signature, party.proof())

    def verify(self, party: Party, *, model_id: str, epoch: int) -> None:
        """Raises UnauthenticatedOrigin unless the coordinator of this very save offers it."""
        signer = VerifyingKey.from_bytes(self.signer)
        party.check(signer, self.proof)
        message = self._message(self.id, self.recipient, model_id, epoch)
        if not signer.verify(Purpose.CHECKPOINT_OFFER, message, self.signature):
            raise UnauthenticatedOrigin(
                "checkpoint: the coordinator's offer is not for this model id and epoch",
                hint="give every rank the same model_id= and epoch=",
            )
