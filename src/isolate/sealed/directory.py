"""The directory: what the owner signs, where everything stands, and the file digest. Sans-IO.

    >>> from isolate.sealed.directory import Epoch, encode_trailer, parse_trailer
    >>> parse_trailer(encode_trailer(6000), 100_000), Epoch(3)
    (6000, Epoch(least=3, generation=0))

docs/spec/sealed-file.md, sections 5 (directory), 6 (trailer) and 7 (digest). Parsing answers whether bytes are well
formed, agree with one another, and carry a signature of the signer they name. Whose signature that must be is
the caller's question.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, Self

from attrs import field, frozen

from isolate.crypto import cbor
from isolate.crypto.signing import HYBRID_SIGNATURE, Purpose, SigningKey, VerifyingKey
from isolate.errors import Tampered, Truncated, UsageError
from isolate.sealed.header import Slot
from isolate.sealed.layout import (
    ALIGNMENT,
    COMPARTMENT_ID,
    DIRECTORY_ID,
    END_MAGIC,
    HASH_SIZE,
    HEADER_SIZE,
    MAX_COMPARTMENTS,
    MAX_DATA,
    MAX_DIRECTORY,
    MAX_MODEL_ID,
    MAX_NUMBER,
    MAX_SECTION,
    TRAILER_SIZE,
    VERSION,
    Params,
    decode,
    need,
    record,
)

_TRAILER = struct.Struct("<Q8s")
_ROW_FIELDS: dict[str, type] = {
    "id": str, "length": int, "commitment": bytes, "table": bytes, "manifest": bytes, "size": int,
}  # fmt: skip


@frozen
class Compartment:
    """One row of the directory. ``length``: bytes of ciphertext; ``table``, ``manifest``: digests of sections."""

    id: str
    length: int
    commitment: bytes
    table: bytes
    manifest_length: int
    manifest: bytes

    def encode(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "length": self.length,
            "commitment": self.commitment,
            "table": self.table,
            "manifest": self.manifest,
            "size": self.manifest_length,
        }

    @classmethod
    def parse(cls, value: Any, params: Params) -> Self:
        stage = "directory"
        row = record(value, _ROW_FIELDS, stage)
        need(COMPARTMENT_ID.fullmatch(row["id"]) is not None or row["id"] == DIRECTORY_ID, stage, "bad id")
        need(0 <= row["length"] <= MAX_DATA and row["length"] % ALIGNMENT == 0, stage, "bad length")
        need(all(len(row[name]) == HASH_SIZE for name in ("commitment", "table", "manifest")), stage, "bad digest")
        size = row["size"] - params.suite.tag_size
        need(0 < size <= MAX_SECTION and size % ALIGNMENT == 0, stage, "bad manifest size")
        need(row["id"] != DIRECTORY_ID or row["length"] == 0, stage, "bad length")
        return cls(row["id"], row["length"], row["commitment"], row["table"], row["size"], row["manifest"])


@frozen
class Extent:
    """Where one compartment's parts stand in the file: offsets and lengths in bytes."""

    row: Compartment
    data: int
    table: int
    table_length: int
    manifest: int


_DIRECTORY_FIELDS: dict[str, type] = {
    "version": int, "suite": int, "chunk": int, "salt": bytes, "commitment": bytes, "model": str, "epoch": int,
    "previous": bytes, "signer": bytes, "compartments": list,
}  # fmt: skip


@frozen
class Directory:
    """The signed part of the footer. ``raw``: what is signed; ``previous``: 32 bytes or none."""

    params: Params
    commitment: bytes
    model_id: str
    epoch: int
    previous: bytes | None
    signer: VerifyingKey
    rows: tuple[Compartment, ...]
    raw: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @classmethod
    def make(
        cls, params: Params, commitment: bytes, rows: Sequence[Compartment], *,
        model_id: str, epoch: int, previous: bytes | None, sign: SigningKey,
    ) -> Self:  # fmt: skip
        """Encode and sign."""
        raw = cbor.encode(
            {
                "version": VERSION,
                "suite": int(params.suite),
                "chunk": params.chunk_size,
                "salt": params.salt,
                "commitment": commitment,
                "model": model_id,
                "epoch": epoch,
                "previous": previous or b"",
                "signer": sign.verifying_key.to_bytes(),
                "compartments": [row.encode() for row in rows],
            }
        )
        if len(raw) > MAX_DIRECTORY:
            raise UsageError("the directory is full: too many compartments")
        return cls.parse(raw + sign.sign_hybrid(Purpose.SEALED_DIRECTORY, raw))

    def encode(self) -> bytes:
        return self.raw + self.signature

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read body and signature, and verify it. Raises Truncated, MalformedError or Tampered."""
        stage = "directory"
        if len(data) <= HYBRID_SIGNATURE:
            raise Truncated(f"{stage}: {len(data)} bytes")
        raw, signature = data[:-HYBRID_SIGNATURE], data[-HYBRID_SIGNATURE:]
        body = record(decode(raw, stage, MAX_DIRECTORY), _DIRECTORY_FIELDS, stage)
        need(body["version"] == VERSION, stage, "the version differs from the header's")
        params = Params.parse(body, stage)
        need(len(body["commitment"]) == HASH_SIZE, stage, "the commitment is not 32 bytes")
        need(len(body["model"].encode()) <= MAX_MODEL_ID, stage, "the model id is too long")
        need(0 <= body["epoch"] < MAX_NUMBER, stage, "epoch out of range")
        need(len(body["previous"]) in (0, HASH_SIZE), stage, "previous is no digest")
        need(len(body["signer"]) == 64, stage, "the signer is not 64 bytes")
        need(2 <= len(body["compartments"]) <= MAX_COMPARTMENTS + 1, stage, "bad number of compartments")
        rows = tuple(Compartment.parse(value, params) for value in body["compartments"])
        need(rows[0].id == DIRECTORY_ID, stage, "the first row is not the file's own")
        need(len({row.id for row in rows}) == len(rows), stage, "a compartment stands twice")
        need(sum(row.length for row in rows) <= MAX_DATA, stage, "too much data")
        signer = VerifyingKey.from_bytes(body["signer"])
        if not signer.verify_hybrid(Purpose.SEALED_DIRECTORY, raw, signature):
            raise Tampered(f"{stage}: the signature does not match")
        return cls(
            params, body["commitment"], body["model"], body["epoch"], body["previous"] or None, signer, rows, raw,
            signature,
        )  # fmt: skip

    @property
    def digest(self) -> bytes:
        """The file digest, 32 bytes: what ``expect=`` takes. It covers everything but stanzas and signature."""
        return hashlib.sha256(b"isolate/v1/sealed/digest\0" + self.raw).digest()

    def extents(self) -> tuple[Extent, ...]:
        """Where everything stands: lengths determine it, so that no offset can lie."""
        data, footer = HEADER_SIZE, HEADER_SIZE + sum(row.length for row in self.rows)
        found = []
        for row in self.rows:
            table = self.params.chunks(row.length) * self.params.entry_size + self.params.suite.tag_size
            found.append(Extent(row, data, footer, table, footer + table))
            data += row.length
            footer += table + row.manifest_length
        return tuple(found)

    def file_size(self) -> int:
        last = self.extents()[-1]
        return last.manifest + last.row.manifest_length + len(self.raw) + len(self.signature) + TRAILER_SIZE


def encode_trailer(directory_length: int) -> bytes:
    return _TRAILER.pack(directory_length, END_MAGIC)


def parse_trailer(trailer: bytes, file_size: int) -> int:
    """The length of the directory, which ends where the trailer begins. Raises Truncated."""
    length, magic = _TRAILER.unpack(trailer)
    if magic != END_MAGIC or not HYBRID_SIGNATURE < length <= MAX_DIRECTORY + HYBRID_SIGNATURE:
        raise Truncated("trailer: the end of the file is not where it must be")
    if length > file_size - HEADER_SIZE - TRAILER_SIZE:
        raise Truncated("trailer: the file is shorter than its directory")
    return int(length)


@frozen
class Epoch:
    """For ``expect=``: the least epoch, and (where a rewrap must not be undone) the least header generation."""

    least: int
    generation: int = 0


@frozen
class PublicFacts:
    """What anyone can read of a sealed file, checked for consistency: bytes of the live slot and of the directory.

    Nothing here says that the signer is the right one: compare ``signer``, ``digest`` or both.
    """

    header: bytes = field(repr=False)
    directory: bytes = field(repr=False)
    slot: Slot = field(repr=False)
    contents: Directory = field(repr=False)

    @classmethod
    def parse(cls, header: bytes, directory: bytes) -> Self:
        """Raises NotSealed, Truncated, MalformedError or Tampered."""
        slot, contents = Slot.parse(header), Directory.parse(directory)
        if (slot.params, slot.commitment) != (contents.params, contents.commitment):
            raise Tampered("directory: header and directory are of different files")
        return cls(header, directory, slot, contents)

    @property
    def digest(self) -> bytes:
        return self.contents.digest

    @property
    def model_id(self) -> str:
        return self.contents.model_id

    @property
    def epoch(self) -> int:
        return self.contents.epoch

    @property
    def previous(self) -> bytes | None:
        return self.contents.previous

    @property
    def compartments(self) -> tuple[str, ...]:
        """The ids, without the file's own section."""
        return tuple(row.id for row in self.contents.rows[1:])

    @property
    def signer(self) -> VerifyingKey:
        return self.contents.signer

    @property
    def generation(self) -> int:
        return self.slot.generation
