"""The key tree of a sealed file: from one file key to every other key, and what commits to it.

    >>> from isolate.crypto.aead import Suite
    >>> from isolate.sealed.keys import FileKey, compartment_key
    >>> from isolate.sealed.layout import Params
    >>> params = Params(Suite.AEGIS_256, 1 << 20, bytes(32))
    >>> key = FileKey.generate()
    >>> len(compartment_key(key, params, "main"))
    32

docs/spec/sealed-file.md, section 3. Version, suite and chunk size go into every derivation as context, the salt as
HKDF's salt: a file whose suite was changed has other keys. A commitment is an HKDF output under a label of its
own: SHA-256 would have to collide for two keys to share one.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from hashlib import sha256
from typing import ClassVar

from attrs import field, frozen

from isolate.crypto.aead import Cipher
from isolate.crypto.kdf import Label, derive
from isolate.crypto.secret import Secret, wipe
from isolate.errors import UsageError
from isolate.sealed.directory import PublicFacts
from isolate.sealed.layout import DIRECTORY_ID, HASH_SIZE, VERSION, Params


class FileKey(Secret):
    """32 random bytes, fresh for every file: opens all of it."""

    __slots__ = ()
    size: ClassVar[int | None] = 32


class CompartmentKey(Secret):
    """Opens one compartment: its names, shapes, metadata and bytes."""

    __slots__ = ()
    size: ClassVar[int | None] = 32


@frozen(eq=False)
class CompartmentKeys:
    """What a key release carries: keys of compartments by id, good for the file with this digest only.

    The id ``*`` stands for the file's own section, which holds its metadata.
    """

    digest: bytes
    keys: Mapping[str, Secret] = field(repr=lambda keys: repr(sorted(keys)))

    def __attrs_post_init__(self) -> None:
        if len(self.digest) != HASH_SIZE:
            raise UsageError("a file digest is 32 bytes")
        if any(len(key) != 32 for key in self.keys.values()):
            raise UsageError("a compartment key is 32 bytes")


def _context(params: Params) -> tuple[int, int, int]:
    return VERSION, int(params.suite), params.chunk_size


def commitment(file_key: FileKey, params: Params) -> bytes:
    """32 bytes that only this key, salt, suite and chunk size give."""
    with derive(file_key, Label.SEALED_COMMITMENT, *_context(params), salt=params.salt) as value:
        return bytes(value.expose())


def header_mac(file_key: FileKey, params: Params, authenticated: bytes) -> bytes:
    """HMAC-SHA-256 over prefix and body of a header slot."""
    with derive(file_key, Label.SEALED_HEADER, *_context(params), salt=params.salt) as key:
        raw = bytearray(key.expose())  # hmac takes no views
        try:
            return hmac.new(raw, authenticated, sha256).digest()
        finally:
            wipe(raw)


def compartment_key(file_key: FileKey, params: Params, name: str) -> CompartmentKey:
    """The key of compartment ``name``, or of the file's own section (``*``)."""
    context = _context(params)
    if name == DIRECTORY_ID:
        return derive(file_key, Label.SEALED_DIRECTORY, *context, salt=params.salt, into=CompartmentKey)
    return derive(file_key, Label.SEALED_COMPARTMENT, *context, name, salt=params.salt, into=CompartmentKey)


def compartment_commitment(key: Secret, params: Params, name: str) -> bytes:
    """32 bytes that only this compartment key gives: a holder of one compartment needs no file key to check it."""
    label = Label.SEALED_COMPARTMENT_COMMITMENT
    with derive(key, label, *_context(params), name, salt=params.salt) as value:
        return bytes(value.expose())


def part_cipher(key: Secret, params: Params, name: str, label: Label) -> Cipher:
    """The cipher of one part of a compartment: label SEALED_TABLE, SEALED_MANIFEST or SEALED_CHUNKS."""
    with derive(key, label, *_context(params), name, salt=params.salt) as derived:
        return Cipher(params.suite, derived)


def nonce(params: Params, index: int) -> bytes:
    """Chunk ``index``, big-endian behind zeros; table and manifest use 0, each under its own key."""
    return index.to_bytes(params.suite.nonce_size, "big")


def check_file_key(file_key: FileKey, facts: PublicFacts) -> bool:
    """Whether this is the key that the commitment names, and the header's MAC is made with it."""
    slot = facts.slot
    return hmac.compare_digest(commitment(file_key, slot.params), slot.commitment) and hmac.compare_digest(
        header_mac(file_key, slot.params, slot.authenticated), slot.mac
    )
