"""What the parts of a sealed file have in common: constants, limits, and the parameters of its keys.

    >>> from isolate.sealed import layout
    >>> layout.HEADER_SIZE, layout.align(1), layout.align(4096)
    (65536, 4096, 4096)

The bytes are in header.py (docs/spec/sealed-file.md, section 2), manifest.py (4) and directory.py (5, 6). All three
are sans-IO: bytes in, values out, and no keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self

from attrs import frozen

from isolate.crypto import cbor
from isolate.crypto.aead import Suite
from isolate.errors import MalformedError, UsageError

# Format constants: version 1 is frozen, another value is another version.
MAGIC = b"\x89isolate"
END_MAGIC = b"etalosi\x89"
VERSION = 1
HEADER_SIZE = 65536
SLOT_SIZE = 28672
SLOT_OFFSETS = (0, 28672)
JOURNAL_OFFSET = 61440
JOURNAL = b"rewrap\xa5\x5a"
ALIGNMENT = 4096
KEY_SIZE = SALT_SIZE = HASH_SIZE = 32
TRAILER_SIZE = 16
DIRECTORY_ID = "*"

# Implementation limits, in bytes unless said otherwise.
CHUNK_SIZE = 1 << 20  # what the writer uses; 256 KiB and 1 MiB measure alike, 16 KiB half
MIN_CHUNK, MAX_CHUNK = 1 << 12, 1 << 24
MAX_DIRECTORY = 1 << 22
MAX_SECTION = 1 << 28
MAX_COMPARTMENTS = 4096  # a count
MAX_DATA = 1 << 50
MAX_NUMBER = 1 << 63
MAX_MODEL_ID = 256

COMPARTMENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def align(size: int) -> int:
    """``size`` rounded up to a multiple of 4096."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def check_compartment_id(name: str) -> str:
    """Raises UsageError unless ``name`` can be a compartment id: 1 to 64 of A-Z a-z 0-9 . _ -, no leading sign."""
    if not COMPARTMENT_ID.fullmatch(name):
        raise UsageError(f"{name[:80]!r} is no compartment id: letters, digits, '.', '_' and '-', 64 at most")
    return name


def is_zero(data: bytes) -> bool:
    """Whether every byte is zero. (``any`` walks them one by one: 80 us for a slot, where this takes 1.)"""
    return data == bytes(len(data))


def need(ok: bool, stage: str, message: str) -> None:
    """Raises MalformedError unless ``ok``."""
    if not ok:
        raise MalformedError(f"{stage}: {message}")


def record(value: Any, fields: dict[str, type], stage: str) -> dict[str, Any]:
    """``cbor.check``, with the stage before its message."""
    try:
        return cbor.check(value, fields)
    except MalformedError as error:
        raise MalformedError(f"{stage}: {error.message}") from None


def decode(data: bytes, stage: str, limit: int) -> Any:
    """``cbor.decode``, with the stage before its message."""
    try:
        return cbor.decode(data, max_size=limit)
    except MalformedError as error:
        raise MalformedError(f"{stage}: {error.message}") from None


@frozen
class Params:
    """What every key of a file is derived with: suite, chunk size in bytes, salt (32 bytes)."""

    suite: Suite
    chunk_size: int
    salt: bytes

    @classmethod
    def parse(cls, fields: Mapping[str, Any], stage: str) -> Self:
        try:
            suite = Suite(fields["suite"])
        except ValueError:
            raise MalformedError(f"{stage}: unknown suite") from None
        chunk = fields["chunk"]
        need(MIN_CHUNK <= chunk <= MAX_CHUNK and chunk & (chunk - 1) == 0, stage, "chunk size out of range")
        need(len(fields["salt"]) == SALT_SIZE, stage, "the salt is not 32 bytes")
        return cls(suite, chunk, fields["salt"])

    @property
    def entry_size(self) -> int:
        """Bytes of one row of a chunk table: tag and digest."""
        return self.suite.tag_size + HASH_SIZE

    def chunks(self, length: int) -> int:
        return -(-length // self.chunk_size)
