"""Key agreement for channels: X25519 (RFC 7748) and ML-KEM-768 (FIPS 203), with keys that are shown to nobody.

    >>> from isolate.crypto.exchange import CurveKey, LatticeKey, encapsulate
    >>> ours, theirs = CurveKey.generate(), CurveKey.generate()
    >>> ours.exchange(theirs.public).equals(theirs.exchange(ours.public))
    True
    >>> key = LatticeKey.generate()
    >>> shared, boxed = encapsulate(key.public)
    >>> key.decapsulate(boxed).equals(shared), len(key.public), len(boxed)
    (True, 1184, 1088)

Everything malformed, and every public key of small order (an all-zero shared secret), raises MalformedError.
"""

from __future__ import annotations

from typing import Self

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from isolate.crypto.secret import Secret
from isolate.errors import MalformedError, UsageError

CURVE_SIZE = 32
LATTICE_PUBLIC = 1184
LATTICE_BOXED = 1088


class CurveKey:
    """An X25519 private key; ``public`` is 32 bytes."""

    __slots__ = ("_private", "public")

    def __init__(self, private: Secret) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private.expose())
        self.public = self._private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Self:
        return cls(Secret.generate(CURVE_SIZE))

    def exchange(self, public: bytes) -> Secret:
        """The shared secret, 32 bytes. Raises MalformedError for a wrong length or a point of small order."""
        try:
            return Secret(self._private.exchange(X25519PublicKey.from_public_bytes(public)))
        except ValueError:
            raise MalformedError("this is no usable X25519 key") from None

    def __repr__(self) -> str:
        return "CurveKey(hidden)"

    def __reduce_ex__(self, protocol: object) -> str | tuple[object, ...]:
        raise UsageError("a CurveKey is not copied, pickled or serialised")


class LatticeKey:
    """An ML-KEM-768 private key; ``public`` is 1184 bytes."""

    __slots__ = ("_private", "public")

    def __init__(self, seed: Secret) -> None:
        self._private = MLKEM768PrivateKey.from_seed_bytes(seed.expose())
        self.public = self._private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Self:
        return cls(Secret.generate(64))

    def decapsulate(self, boxed: bytes) -> Secret:
        """The shared secret, 32 bytes (another one, unknown to all, for a ciphertext that was tampered with)."""
        try:
            return Secret(self._private.decapsulate(boxed))
        except ValueError:
            raise MalformedError("this is no ML-KEM-768 ciphertext") from None

    def __repr__(self) -> str:
        return "LatticeKey(hidden)"

    def __reduce_ex__(self, protocol: object) -> str | tuple[object, ...]:
        raise UsageError("a LatticeKey is not copied, pickled or serialised")


def encapsulate(public: bytes) -> tuple[Secret, bytes]:
    """A fresh shared secret (32 bytes) and its ciphertext (1088 bytes) for an ML-KEM-768 key."""
    try:
        shared, boxed = MLKEM768PublicKey.from_public_bytes(public).encapsulate()
    except ValueError:
        raise MalformedError("this is no ML-KEM-768 key") from None
    return Secret(shared), boxed
