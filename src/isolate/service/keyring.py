"""The service's own keys, sealed at rest: one sealed file, opened with a passphrase or by a KMS or HSM.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.sealed.recipients import Passphrase
    >>> owner, unlock = SigningKey.generate(), Passphrase("correct horse", memory=64, passes=1)
    >>> made = Keyring.generate(owner, name="demo", lineage="demo", recovery=[], epoch=1, now=1_700_000_000)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made.save(Path(folder), owner=owner, unlock=unlock)
    ...     Keyring.load(Path(folder), owner=owner.verifying_key, unlock=unlock).certificate == made.certificate
    True

The file holds the seeds and the certificate that names their public halves, so that both are replaced in one step.
It is signed by the owner's root: a file that somebody else sealed to the same passphrase is refused. Beside it lies
a copy for the owner's offline recovery recipients, if there are any: a lost passphrase is no lost service.
Spec: docs/spec/service.md, section 9.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self, TypeAlias

import numpy as np
from attrs import field, frozen

from isolate import sealed
from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.secret import Secret, wipe
from isolate.crypto.signing import SigningKey, VerifyingKey
from isolate.errors import NoRecipient, ReleaseRefused, StorageError, UsageError
from isolate.messages.attest import ServiceCertificate
from isolate.sealed.recipients import AnyRecipient, KeyWrapper, Passphrase, open_file_key

CERTIFICATE_LIFETIME = 90 * 24 * 3600  # seconds
BACKDATED = 60  # seconds by which a client's clock may be behind
MAX_FORMER = 32  # recipient keys of earlier rotations that are kept: assets are still sealed to them

KEYS, RECOVERY = "keys.sealed", "keys-recovery.sealed"
_SIGNING = ("release", "result", "log")

Unlock: TypeAlias = "Passphrase | KeyWrapper"


def _info(name: str) -> bytes:
    return b"isolate/v1/service/box\0" + name.encode()


@frozen(repr=False)
class Keyring:
    """The keys of one service. ``seeds``: release, result, log, and recipient-0 (the newest), recipient-1 ..."""

    certificate: ServiceCertificate
    seeds: Mapping[str, Secret]
    release: SigningKey = field(init=False)
    result: SigningKey = field(init=False)
    log: SigningKey = field(init=False)
    identities: tuple[Identity, ...] = field(init=False)

    def __attrs_post_init__(self) -> None:
        for purpose in _SIGNING:
            object.__setattr__(self, purpose, SigningKey(self.seeds[purpose]))
        names = [f"recipient-{number}" for number in range(len(self.seeds) - len(_SIGNING))]
        object.__setattr__(self, "identities", tuple(Identity(self.seeds[name]) for name in names))
        mine = [key.verifying_key.to_bytes() for key in (self.release, self.result, self.log)]
        named = self.certificate
        if [named.release, named.result, named.log, named.recipient] != [*mine, self.identities[0].recipient.raw]:
            raise StorageError("the keys of this state are not those that its certificate names")

    @classmethod
    def generate(
        cls, owner: SigningKey, *, name: str, lineage: str, recovery: Sequence[bytes], epoch: int, now: int
    ) -> Self:
        """Fresh keys, certified by the owner's root for 90 days. ``recovery``: recipients, 1216 bytes each."""
        seeds = {purpose: Secret.generate(32) for purpose in (*_SIGNING, "recipient-0")}
        return cls._certified(seeds, owner, name=name, lineage=lineage, recovery=recovery, epoch=epoch, now=now)

    def rotated(self, owner: SigningKey, *, now: int, epoch: int | None = None) -> Keyring:
        """Fresh keys in place of these, with a new certificate; former recipient keys go on opening what is there.

        The log's key stays, since whoever remembers a checkpoint knows it; in another ``epoch`` it is a new log.
        Raises UsageError when this owner did not certify the service.
        """
        try:
            self.certificate.verify(owner.verifying_key, self.certificate.lineage)
        except ReleaseRefused:
            raise UsageError("this is not the owner's key that the service was made with") from None
        former = [self.seeds[f"recipient-{number}"] for number in range(len(self.identities))][: MAX_FORMER - 1]
        fresh = {purpose: Secret.generate(32) for purpose in ("release", "result")}
        kept = {"log": self.seeds["log"] if epoch is None else Secret.generate(32)}
        recipients = [Secret.generate(32), *former]
        seeds = fresh | kept | {f"recipient-{number}": seed for number, seed in enumerate(recipients)}
        old = self.certificate
        return self._certified(
            seeds, owner, name=old.name, lineage=old.lineage, recovery=old.recovery,
            epoch=old.epoch if epoch is None else epoch, now=now,
        )  # fmt: skip

    @classmethod
    def _certified(
        cls,
        seeds: Mapping[str, Secret],
        owner: SigningKey,
        *,
        name: str,
        lineage: str,
        recovery: Sequence[bytes],
        epoch: int,
        now: int,
    ) -> Self:
        public = {purpose: SigningKey(seeds[purpose]).verifying_key.to_bytes() for purpose in _SIGNING}
        certificate = ServiceCertificate(
            name=name,
            lineage=lineage,
            epoch=epoch,
            **public,
            recipient=Identity(seeds["recipient-0"]).recipient.raw,
            recovery=list(recovery),
            not_before=now - BACKDATED,
            not_after=now + CERTIFICATE_LIFETIME,
        ).sign(owner)
        return cls(certificate, seeds)

    def save(self, folder: Path, *, owner: SigningKey, unlock: Unlock) -> None:
        """Write the files, each in one step. Raises StorageError, and what the KeyWrapper raises."""
        raw = {name: np.frombuffer(seed.expose(), np.uint8) for name, seed in self.seeds.items()}
        raw["certificate"] = np.frombuffer(self.certificate.encode(), np.uint8)
        # The copy for recovery first: interrupted between the two, it holds more than is in use, never less.
        copies: list[tuple[str, list[AnyRecipient]]] = []
        if self.certificate.recovery:
            copies.append((RECOVERY, [Recipient(one) for one in self.certificate.recovery]))
        copies.append((KEYS, [unlock]))
        for name, recipients in copies:
            sealed.save_file(raw, folder / name, recipients=recipients, sign=owner, model_id=f"keys/{name}")

    @classmethod
    def load(cls, folder: Path, *, owner: VerifyingKey, unlock: Unlock | Identity) -> Self:
        """Open it; an Identity opens the copy for recovery. Raises a SealedError or StorageError."""
        name = RECOVERY if isinstance(unlock, Identity) else KEYS
        if not (folder / name).is_file():
            raise StorageError(f"{folder} holds no {name}")
        found = sealed.load_file(folder / name, identity=unlock, signed_by=owner)
        encoded = found.pop("certificate", np.zeros(0, np.uint8)).tobytes()
        seeds = {}
        for purpose, array in found.items():
            seeds[purpose] = Secret(array.data)
            wipe(array.data)
        recipients = {f"recipient-{number}" for number in range(len(seeds) - len(_SIGNING))}
        if (
            not recipients
            or set(seeds) != {*_SIGNING, *recipients}
            or any(len(one) != 32 for one in seeds.values())
        ):
            raise StorageError(f"{name} holds other keys than a service has")
        return cls(ServiceCertificate.parse(encoded), seeds)

    def box(self, name: str, secret: Secret) -> bytes:
        """Seal a further secret to ourselves, to lie in the database under this name."""
        return self.identities[0].recipient.seal(secret.expose(), info=_info(name))

    def open(self, name: str, box: bytes) -> Secret:
        """Raises NoRecipient."""
        for identity in self.identities[:-1]:
            try:
                return identity.open(box, info=_info(name))
            except NoRecipient:
                continue
        return self.identities[-1].open(box, info=_info(name))

    def unlock(self, facts: sealed.PublicFacts) -> sealed.FileKey:
        """The key of a sealed file, with whichever of our recipient keys it was sealed to. Raises NoRecipient."""
        for identity in self.identities[:-1]:
            try:
                return open_file_key(facts, identity)
            except NoRecipient:
                continue
        return open_file_key(facts, self.identities[-1])

    def __repr__(self) -> str:
        return f"Keyring({self.certificate.name!r}, epoch {self.certificate.epoch}, keys hidden)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("a keyring is not copied or pickled")
