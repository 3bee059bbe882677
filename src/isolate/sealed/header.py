"""The header area: who can open the file, in two slots of which one counts. Sans-IO.

    >>> from isolate.errors import NotSealed
    >>> try:
    ...     live_slot(b"plain".ljust(65536))
    ... except NotSealed as refusal:
    ...     print(refusal.code)
    not_sealed

docs/spec/sealed-file.md, section 2. What is read here is authenticated later, by the MAC in it (a key holder's
check) and by the directory that repeats suite, chunk size, salt and commitment under a signature.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Self

from attrs import field, frozen

from isolate.crypto import cbor
from isolate.errors import MalformedError, NotSealed, SealedError, Tampered, Truncated, UsageError
from isolate.sealed.layout import (
    HASH_SIZE,
    HEADER_SIZE,
    JOURNAL,
    JOURNAL_OFFSET,
    MAGIC,
    MAX_NUMBER,
    SLOT_OFFSETS,
    SLOT_SIZE,
    VERSION,
    Params,
    decode,
    is_zero,
    need,
    record,
)

_PREFIX = struct.Struct("<8sHHI")
_TAIL = 2 * HASH_SIZE
_PQ, _CLASSICAL, _SYMMETRIC = "pq", "classical", "symmetric"

# Stanza type -> its fields. A new type is a row here and a wrapper in recipients.py.
STANZAS: Mapping[str, dict[str, type]] = {
    "x-wing": {"type": str, "hint": bytes, "box": bytes},
    "argon2id": {"type": str, "salt": bytes, "passes": int, "memory": int, "box": bytes},
    "wrapped": {"type": str, "label": str, "key": str, "box": bytes},
}
HINT_SIZE = 8
MAX_BOX = 8192
# A stranger chooses the work factor: 64 passes over 1 MiB, or 4 over 1 GiB, and no more.
MAX_PASSES, MAX_MEMORY, MAX_WORK = 64, 1 << 20, 4 << 20  # passes, KiB, KiB times passes


@frozen
class Stanza:
    """The file key, wrapped for one recipient. ``fields`` as in STANZAS."""

    fields: Mapping[str, Any] = field(repr=False)

    @property
    def type(self) -> str:
        return str(self.fields["type"])

    @property
    def label(self) -> str:
        """pq, classical or symmetric."""
        return str(self.fields.get("label") or {"x-wing": _PQ, "argon2id": _SYMMETRIC}[self.type])

    @classmethod
    def parse(cls, value: Any) -> Self:
        stage = "header"
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in STANZAS:
            raise MalformedError(f"{stage}: unknown stanza type")
        fields = record(value, STANZAS[kind], stage)
        need(0 < len(fields["box"]) <= MAX_BOX, stage, "a stanza's box is empty or too long")
        if kind == "x-wing":
            need(len(fields["hint"]) == HINT_SIZE, stage, "a stanza's hint is not 8 bytes")
        elif kind == "argon2id":
            passes, memory = fields["passes"], fields["memory"]
            need(len(fields["salt"]) == 16, stage, "a passphrase salt is not 16 bytes")
            need(
                1 <= passes <= MAX_PASSES and 8 <= memory <= MAX_MEMORY and passes * memory <= MAX_WORK,
                stage, "the passphrase's work factor is out of bounds",
            )  # fmt: skip
        else:
            need(fields["label"] in (_PQ, _CLASSICAL, _SYMMETRIC), stage, "unknown stanza label")
            need(0 < len(fields["key"]) <= 512, stage, "a key name is empty or too long")
        return cls(fields)


def check_stanzas(stanzas: Sequence[Stanza]) -> None:
    """Raises MalformedError for none, for pq beside classical, and for a passphrase that is not alone."""
    stage = "header"
    need(bool(stanzas), stage, "no stanza")
    labels = {stanza.label for stanza in stanzas}
    need(not {_PQ, _CLASSICAL} <= labels, stage, "post-quantum and classical recipients do not mix")
    need(len(stanzas) == 1 or all(s.type != "argon2id" for s in stanzas), stage, "a passphrase stands alone")
    need(len({cbor.encode(dict(s.fields)) for s in stanzas}) == len(stanzas), stage, "a stanza stands twice")


@frozen
class Slot:
    """One copy of the header: generation, params, commitment (32 bytes), stanzas, MAC (32 bytes)."""

    generation: int
    params: Params
    commitment: bytes
    stanzas: tuple[Stanza, ...]
    raw: bytes = field(repr=False)

    @property
    def authenticated(self) -> bytes:
        """The bytes that the MAC covers."""
        return self.raw[:-_TAIL]

    @property
    def mac(self) -> bytes:
        return self.raw[-_TAIL:-HASH_SIZE]

    @staticmethod
    def unauthenticated(generation: int, params: Params, commitment: bytes, stanzas: Sequence[Stanza]) -> bytes:
        """What the MAC is computed over: prefix and body. Raises UsageError when it does not fit into a slot."""
        body = cbor.encode(
            {
                "generation": generation,
                "suite": int(params.suite),
                "chunk": params.chunk_size,
                "salt": params.salt,
                "commitment": commitment,
                "stanzas": [dict(stanza.fields) for stanza in stanzas],
            }
        )
        if _PREFIX.size + len(body) + _TAIL > SLOT_SIZE:
            raise UsageError(f"the header is full: {len(stanzas)} recipients do not fit into {SLOT_SIZE} bytes")
        return _PREFIX.pack(MAGIC, VERSION, 0, len(body)) + body

    @staticmethod
    def finish(authenticated: bytes, mac: bytes) -> bytes:
        """The slot without its zero padding."""
        return authenticated + mac + hashlib.sha256(authenticated + mac).digest()

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Read one slot without padding. Raises NotSealed, Tampered or MalformedError."""
        stage = "header"
        if len(raw) < _PREFIX.size + _TAIL:
            raise Truncated(f"{stage}: a slot of {len(raw)} bytes")
        magic, version, zero, length = _PREFIX.unpack_from(raw)
        if magic != MAGIC:
            raise NotSealed("this is no sealed file")
        need(version == VERSION, stage, f"version {version} is not known here")
        need(zero == 0, stage, "reserved bytes are not zero")
        need(len(raw) == _PREFIX.size + length + _TAIL, stage, "the length of a slot is wrong")
        if hashlib.sha256(raw[:-HASH_SIZE]).digest() != raw[-HASH_SIZE:]:
            raise Tampered(f"{stage}: the checksum of a slot does not match")
        names = {"generation": int, "suite": int, "chunk": int, "salt": bytes, "commitment": bytes, "stanzas": list}
        body = record(decode(raw[_PREFIX.size : -_TAIL], stage, SLOT_SIZE), names, stage)
        need(0 < body["generation"] < MAX_NUMBER, stage, "generation out of range")
        need(len(body["commitment"]) == HASH_SIZE, stage, "the commitment is not 32 bytes")
        stanzas = tuple(Stanza.parse(value) for value in body["stanzas"])
        check_stanzas(stanzas)
        return cls(body["generation"], Params.parse(body, stage), body["commitment"], stanzas, raw)


def encode_header(slot: bytes) -> bytes:
    """The header area at rest: both slots alike, everything else zero."""
    padded = slot.ljust(SLOT_SIZE, b"\0")
    return (padded + padded).ljust(HEADER_SIZE, b"\0")


def _cut(area: bytes) -> bytes:
    """The slot in ``area`` (28672 bytes) without padding, which must be zero."""
    magic, _, _, length = _PREFIX.unpack_from(area)
    if magic != MAGIC:
        raise NotSealed("this is no sealed file")
    end = _PREFIX.size + length + _TAIL
    if end > SLOT_SIZE or not is_zero(area[end:]):
        raise MalformedError("header: a slot is longer than its area, or its padding is not zero")
    return area[:end]


def live_slot(header: bytes) -> Slot:
    """The slot that counts in a header area of 65536 bytes.

    At rest both slots are the same and the rest is zero; anything else is refused. While a rewrap is under way
    (or was killed), the journal word says so, and the readable slot with the greatest generation counts.
    """
    if len(header) < HEADER_SIZE:
        if header[: len(MAGIC)] != MAGIC:
            raise NotSealed("this is no sealed file")
        raise Truncated(f"header: {len(header)} bytes, where {HEADER_SIZE} are needed")
    first, second = (header[offset : offset + SLOT_SIZE] for offset in SLOT_OFFSETS)
    if MAGIC not in (first[: len(MAGIC)], second[: len(MAGIC)]):
        raise NotSealed("this is no sealed file")
    word = header[JOURNAL_OFFSET : JOURNAL_OFFSET + len(JOURNAL)]
    gap = header[SLOT_OFFSETS[1] + SLOT_SIZE : JOURNAL_OFFSET] + header[JOURNAL_OFFSET + len(JOURNAL) : HEADER_SIZE]
    if is_zero(word):
        slot = Slot.parse(_cut(first))
        if first != second or not is_zero(gap):
            raise Tampered("header: the two slots differ, or its padding is not zero")
        return slot
    # Each byte of the word may be written or not: a kill can fall between any two of them.
    if any(byte not in (0, known) for byte, known in zip(word, JOURNAL, strict=True)) or not is_zero(gap):
        raise Tampered("header: its padding is not zero")
    readable: list[Slot] = []
    refusal: SealedError | MalformedError | None = None
    for area in (first, second):
        try:
            readable.append(Slot.parse(_cut(area)))
        except (SealedError, MalformedError) as error:
            refusal = refusal or error
    if not readable:
        raise refusal or Tampered("header: no slot can be read")
    return max(readable, key=lambda slot: slot.generation)
