"""Attestation and key release between an enclave and the service.

    >>> ChallengeRequest(client_nonce=bytes(32), job="digits", rank=0).encode()[:1].hex()
    'a4'

Spec: docs/spec/service.md, sections 2 to 4.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Self

from attrs import evolve, field, frozen

from isolate.crypto import cbor
from isolate.crypto.kem import PUBLIC_SIZE, Recipient
from isolate.crypto.signing import Purpose, SigningKey, VerifyingKey
from isolate.errors import ReleaseRefused
from isolate.messages.base import Bytes32, Bytes64, Limit, Message

MAX_RECOVERY = 16  # offline recipients in a certificate
MAX_INSTANCES = 4096  # in one question about peers
MAX_COMPARTMENTS = 4096  # ids in one release; a file has no more
RawRecipient = Annotated[bytes, Limit(PUBLIC_SIZE, PUBLIC_SIZE)]


@frozen
class ServiceCertificate(Message):
    """The owner's root says: these are my service's keys. An enclave takes nothing from any other service.

    ``release``, ``result`` and ``log`` are verifying keys (64 bytes each); ``recipient`` is the X-Wing key
    (1216 bytes) that assets are sealed to, and ``recovery`` are the owner's offline ones: an enclave seals what it
    makes to these and to nobody else. Times are Unix seconds. ``epoch`` counts from 1: a recovery begins another,
    in which nothing holds that was signed for the one before.
    """

    TYPE = "service-certificate"
    name: str
    lineage: str
    epoch: int
    release: Bytes64
    result: Bytes64
    log: Bytes64
    recipient: RawRecipient
    recovery: Annotated[list[RawRecipient], Limit(0, MAX_RECOVERY)]
    not_before: int
    not_after: int
    signature: bytes = field(default=b"", repr=False)

    def _signed(self) -> bytes:
        keys = [self.release, self.result, self.log, self.recipient, self.recovery]
        return cbor.encode([self.name, self.lineage, self.epoch, keys, self.not_before, self.not_after])

    def sign(self, owner: SigningKey) -> ServiceCertificate:
        return evolve(self, signature=owner.sign(Purpose.SERVICE_CERTIFICATE, self._signed()))

    def verify(self, owner: VerifyingKey, lineage: str) -> Self:
        """Raises ReleaseRefused unless ``owner`` certified it for ``lineage``. Its times are checked later,
        against the service's own signed time: an enclave has no clock that it trusts."""
        if not owner.verify(Purpose.SERVICE_CERTIFICATE, self._signed(), self.signature):
            raise ReleaseRefused(
                "this service's keys are not certified by the owner's root", code="service_uncertified"
            )
        if self.lineage != lineage:
            raise ReleaseRefused("this service is certified for another lineage", code="service_uncertified")
        return self

    def valid_at(self, time: int) -> bool:
        return self.not_before <= time < self.not_after

    @property
    def digest(self) -> bytes:
        """SHA-256 of the encoding, 32 bytes."""
        return hashlib.sha256(self.encode()).digest()

    @property
    def audience(self) -> str:
        """What a signed request names: this service, in this epoch."""
        return f"{self.name}/{self.epoch}"

    @property
    def origin(self) -> str:
        """The name of its log, on the first line of each checkpoint."""
        return f"isolate/{self.audience}"

    @property
    def release_key(self) -> VerifyingKey:
        return VerifyingKey.from_bytes(self.release)

    @property
    def result_key(self) -> VerifyingKey:
        return VerifyingKey.from_bytes(self.result)

    @property
    def log_key(self) -> VerifyingKey:
        return VerifyingKey.from_bytes(self.log)

    def sealing_recipient(self) -> Recipient:
        return Recipient(self.recipient)

    def output_recipients(self) -> list[Recipient]:
        """To whom an enclave seals what it makes: the service, and the owner's offline recipients."""
        return [Recipient(raw) for raw in (self.recipient, *self.recovery)]


@frozen
class CertificateRequest(Message):
    """Anyone may ask who the service is; the answer is its ServiceCertificate."""

    TYPE = "certificate-request"


@frozen
class ChallengeRequest(Message):
    TYPE = "challenge-request"
    client_nonce: Bytes32
    job: str
    rank: int


@frozen
class Challenge(Message):
    """A fresh nonce, the slot that goes with it, and the time, all signed over the asker's own nonce.

    To whoever attests the nonce is 32 opaque bytes. To the service it says until when and for which slot it holds.
    """

    TYPE = "challenge"
    client_nonce: bytes
    nonce: bytes
    job: str
    rank: int
    generation: int
    time: int
    certificate: bytes
    signature: bytes = field(default=b"", repr=False)

    def _signed(self) -> bytes:
        return cbor.encode(
            ["challenge", self.client_nonce, self.nonce, self.job, self.rank, self.generation, self.time]
        )

    def sign(self, key: SigningKey) -> Challenge:
        return evolve(self, signature=key.sign(Purpose.RELEASE, self._signed()))

    def verify(self, owner: VerifyingKey, lineage: str, asked: ChallengeRequest) -> ServiceCertificate:
        """The certificate of the service, once it, its times and this answer's signature hold."""
        certificate = ServiceCertificate.parse(self.certificate).verify(owner, lineage)
        if not certificate.release_key.verify(Purpose.RELEASE, self._signed(), self.signature):
            raise ReleaseRefused("the challenge is not signed by the certified service", code="service_uncertified")
        if (self.client_nonce, self.job, self.rank) != (asked.client_nonce, asked.job, asked.rank):
            raise ReleaseRefused("the challenge answers another question", code="challenge_mismatch")
        if not certificate.valid_at(self.time):
            raise ReleaseRefused("the service's certificate is not valid at its own time", code="service_expired")
        return certificate


@frozen
class AttestRequest(Message):
    """``envelope`` as docs/spec/evidence.md; ``keys`` are the public keys whose digest the evidence carries."""

    TYPE = "attest-request"
    envelope: bytes
    keys: dict[str, bytes]


@frozen
class AttestAnswer(Message):
    TYPE = "attest-answer"
    token: str


@frozen
class ReleaseRequest(Message):
    """Body of a Signed request: keys of the file with this digest; an empty list asks for all compartments."""

    TYPE = "release-request"
    digest: Bytes32
    compartments: Annotated[list[str], Limit(0, MAX_COMPARTMENTS)]
    nonce: Bytes32


@frozen
class Release(Message):
    """Keys for one instance: ``box`` is HPKE to its attested key with ``context`` as info.

    ``context`` is what gives the box its meaning (section 4); the signature is over both.
    """

    TYPE = "release"
    context: bytes
    box: bytes
    signature: bytes = field(repr=False)

    @classmethod
    def make(cls, context: ReleaseContext, keys: dict[str, bytes], hpke: bytes, key: SigningKey) -> Self:
        info = context.encode()
        box = Recipient(hpke).seal(cbor.encode(keys), info=info)
        return cls(info, box, key.sign(Purpose.RELEASE, cbor.encode(["release", info, box])))

    def verify(self, certificate: ServiceCertificate, request: ReleaseRequest, instance: bytes) -> ReleaseContext:
        """The context, once signature, nonce, digest and instance hold. Raises ReleaseRefused."""
        signed = cbor.encode(["release", self.context, self.box])
        if not certificate.release_key.verify(Purpose.RELEASE, signed, self.signature):
            raise ReleaseRefused("the release is not signed by the certified service", code="service_uncertified")
        context = ReleaseContext.parse(self.context)
        if context.nonce != request.nonce or context.digest != request.digest or context.instance != instance:
            raise ReleaseRefused("this release answers another request", code="release_mismatch")
        if request.compartments and set(context.compartments) != set(request.compartments):
            raise ReleaseRefused("this release is of other compartments", code="release_mismatch")
        if not certificate.valid_at(context.time):
            raise ReleaseRefused("the service's certificate was not valid at this release", code="service_expired")
        return context


@frozen
class ReleaseContext(Message):
    """What a release means. ``log_index``: where it stands in the service's log."""

    TYPE = "release-context"
    asset: str
    digest: bytes
    epoch: int
    compartments: list[str]
    nonce: bytes
    instance: bytes
    policy: bytes
    log_index: int
    time: int


@frozen
class StandingRequest(Message):
    """Body of a Signed request by an enclave: are the instances at the other ends of its channels admitted?"""

    TYPE = "standing-request"
    instances: Annotated[list[Bytes32], Limit(0, MAX_INSTANCES)]


@frozen
class PeerStandings(Message):
    """For each instance that was asked about, in that order: empty while it stands, else the code why it does not.

    ``max_stale`` (seconds) is the policy's: how long what is open may go on without the service.
    """

    TYPE = "peer-standings"
    codes: list[str]
    max_stale: int
    time: int


@frozen
class RegisterRequest(Message):
    """Body of a Signed request, by the owner or by an enclave that may write this asset.

    ``header`` and ``directory`` are the public parts of a sealed file (docs/spec/sealed-file.md).
    """

    TYPE = "register-request"
    asset: str
    header: bytes
    directory: bytes


@frozen
class Registered(Message):
    TYPE = "registered"
    asset: str
    digest: bytes
    epoch: int
    log_index: int
