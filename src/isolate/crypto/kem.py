"""Encryption to a recipient: X-Wing (ML-KEM-768 with X25519) through HPKE (RFC 9180, draft-ietf-hpke-pq).

    >>> from isolate.crypto.kem import Identity
    >>> identity = Identity.generate()
    >>> boxed = identity.recipient.seal(b"a file key", info=b"what it is for")
    >>> bytes(identity.open(boxed, info=b"what it is for").expose())
    b'a file key'

HPKE in this form has no associated data and authenticates no sender: whatever gives a message its meaning
goes into ``info``, and who sent it must be proved by something else (a signature, a MAC).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from typing import Self

from attrs import frozen
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from isolate.crypto.secret import Secret, wipe
from isolate.crypto.signing import from_text, read_key_file, to_text, write_key_file
from isolate.errors import KeyFormatError, NoRecipient

PUBLIC_SIZE = 1216  # ML-KEM-768 1184, X25519 32
SEED_SIZE = 32
OVERHEAD = 1088 + 32 + 16  # encapsulation (ML-KEM, X25519) and tag

_SECRET_PREFIX = "ISOLATE-IDENTITY-"  # noqa: S105 (a prefix, no secret)
_PUBLIC_PREFIX = "isolate-recipient-"
_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


@frozen(repr=False)
class Recipient:
    """A public key, 1216 bytes, to which anyone can seal."""

    raw: bytes

    def __attrs_post_init__(self) -> None:
        if len(self.raw) != PUBLIC_SIZE:
            raise KeyFormatError(f"a recipient is {PUBLIC_SIZE} bytes")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``isolate-recipient-...``. Raises KeyFormatError."""
        return cls(from_text(_PUBLIC_PREFIX, text, PUBLIC_SIZE, "recipient"))

    def __str__(self) -> str:
        return to_text(_PUBLIC_PREFIX, self.raw)

    def __repr__(self) -> str:
        return f"Recipient({self.fingerprint.hex()[:16]})"

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the key: a name for it, 32 bytes."""
        return hashlib.sha256(self.raw).digest()

    def seal(self, plaintext: bytes | memoryview, *, info: bytes) -> bytes:
        """Encrypt to this recipient; the answer is 1136 bytes longer. Raises KeyFormatError for a bad key."""
        try:
            public = hpke.MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(self.raw[:1184]),
                X25519PublicKey.from_public_bytes(self.raw[1184:]),
            )
            return _SUITE.encrypt(plaintext, public, info=info)
        except ValueError:
            raise KeyFormatError("this recipient is no valid X-Wing key") from None


class Identity:
    """A private key: one seed of 32 bytes, expanded as draft-connolly-cfrg-xwing-kem does (SHAKE256, 96 bytes)."""

    __slots__ = ("_private", "_seed", "recipient")

    def __init__(self, seed: Secret) -> None:
        self._seed = seed
        expanded = bytearray(hashlib.shake_256(seed.expose()).digest(96))
        lattice = MLKEM768PrivateKey.from_seed_bytes(memoryview(expanded)[:64])
        curve = X25519PrivateKey.from_private_bytes(memoryview(expanded)[64:])
        wipe(expanded)
        self._private = hpke.MLKEM768X25519PrivateKey(lattice, curve)
        self.recipient = Recipient(lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Self:
        return cls(Secret(secrets.token_bytes(SEED_SIZE)))

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(Secret(from_text(_SECRET_PREFIX, text, SEED_SIZE, "identity")))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a key file as `isolate keygen` writes it. Raises KeyFormatError or StorageError."""
        return cls.parse(read_key_file(path, "identity"))

    def save(self, path: str | os.PathLike[str]) -> None:
        comment = f"isolate identity: keep it secret\nrecipient: {self.recipient}"
        write_key_file(path, comment, to_text(_SECRET_PREFIX, self._seed.expose()))

    def open(self, boxed: bytes, *, info: bytes) -> Secret:
        """Decrypt what was sealed to this identity. Raises NoRecipient when it was not, or ``info`` differs."""
        try:
            return Secret(_SUITE.decrypt(boxed, self._private, info=info))
        except (InvalidTag, ValueError):
            raise NoRecipient("nothing here opens with this identity") from None

    def __repr__(self) -> str:
        return f"Identity({self.recipient!r}, key hidden)"

    def __reduce_ex__(self, protocol: object) -> str | tuple[object, ...]:
        return self._seed.__reduce_ex__(protocol)
