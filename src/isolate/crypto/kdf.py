"""Key derivation: HKDF-SHA-256 (RFC 5869) under labels that stand in one table.

    >>> from isolate.crypto.kdf import Label, derive
    >>> from isolate.crypto.secret import Secret, wipe
    >>> root = Secret(bytes(32))
    >>> len(derive(root, Label.SEALED_HEADER)), len(derive(root, Label.SEALED_COMPARTMENT, b"c1"))
    (32, 32)

The ``info`` of HKDF is the deterministic CBOR of ``[label, context...]``, so that no two (label, context)
pairs encode to the same bytes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar, overload

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from isolate.crypto import cbor
from isolate.crypto.secret import Secret, wipe
from isolate.errors import UsageError


class Label(StrEnum):
    """Every purpose a key is derived for. A label is used in one place only, and never changes its meaning."""

    SIGNING_ED25519 = "isolate/v1/signing/ed25519"
    SIGNING_MLDSA65 = "isolate/v1/signing/ml-dsa-65"
    SEALED_COMMITMENT = "isolate/v1/sealed/commitment"
    SEALED_HEADER = "isolate/v1/sealed/header"
    SEALED_DIRECTORY = "isolate/v1/sealed/directory"
    SEALED_COMPARTMENT = "isolate/v1/sealed/compartment"
    SEALED_COMPARTMENT_COMMITMENT = "isolate/v1/sealed/compartment-commitment"
    SEALED_MANIFEST = "isolate/v1/sealed/manifest"
    SEALED_TABLE = "isolate/v1/sealed/table"
    SEALED_CHUNKS = "isolate/v1/sealed/chunks"
    SEALED_PASSPHRASE = "isolate/v1/sealed/passphrase"  # noqa: S105 (a label, no secret)
    SEALED_FOLDER = "isolate/v1/sealed/folder"
    CHANNEL_EXPORTER = "isolate/v1/channel/exporter"
    CHANNEL_APPLICATION = "isolate/v1/channel/application"
    CHANNEL_REKEY = "isolate/v1/channel/rekey"
    AUTHORITY_ROOT = "isolate/v1/authority/root"
    OPERATION_SEED = "isolate/v1/operation/seed"


S = TypeVar("S", bound=Secret)


_HASHES: dict[str, hashes.HashAlgorithm] = {
    "SHA256": hashes.SHA256(),
    "SHA512": hashes.SHA512(),
    "BLAKE2s": hashes.BLAKE2s(32),
    "BLAKE2b": hashes.BLAKE2b(64),
}


def hkdf(
    salt: bytes | memoryview, ikm: bytes | memoryview, info: bytes, length: int, hash_name: str = "SHA256"
) -> bytearray:
    """RFC 5869 extract and expand. Raises UsageError unless ``length`` is 1 to 255 times the size of the hash."""
    algorithm = _HASHES[hash_name]
    if not 0 < length <= 255 * algorithm.digest_size:
        raise UsageError(f"HKDF-{hash_name} gives 1 to {255 * algorithm.digest_size} bytes")
    out = bytearray(length)
    HKDF(algorithm, length, bytes(salt), info).derive_into(ikm, out)
    return out


@overload
def derive(
    key: Secret, label: Label, *context: bytes | int | str, salt: bytes = b"", length: int = 32
) -> Secret: ...
@overload
def derive(
    key: Secret, label: Label, *context: bytes | int | str, salt: bytes = b"", length: int = 32, into: type[S]
) -> S: ...
def derive(
    key: Secret,
    label: Label,
    *context: bytes | int | str,
    salt: bytes = b"",
    length: int = 32,
    into: type[Secret] = Secret,
) -> Secret:
    """Derive ``length`` bytes for ``label`` and ``context`` from ``key``, as an instance of ``into``."""
    okm = hkdf(salt, key.expose(), cbor.encode([label.value, *context]), length)
    try:
        return into(okm)
    finally:
        wipe(okm)
