"""Names, dtypes and shapes: the manifest of one compartment, and where its tensors stand.

    >>> from isolate.sealed.manifest import Entry, Manifest
    >>> manifest = Manifest((Entry("a", "F32", (2, 3)), Entry("b", "BF16", (5,))), {})
    >>> [(entry.name, start, entry.size) for entry, start in manifest.places()]
    [('a', 0, 24), ('b', 4096, 10)]
    >>> Manifest.parse(manifest.encode()) == manifest
    True

docs/spec/sealed-file.md, section 4.2. Offsets are not written: tensors follow one another in the order of the
manifest, each at the next multiple of 4096 bytes, so that none can overlap, hide or point outside.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from attrs import frozen

from isolate.crypto import cbor
from isolate.errors import MalformedError, UsageError
from isolate.sealed.layout import MAX_DATA, MAX_SECTION, align, is_zero

# safetensors' names, and the bits of one element.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
MAX_DIMENSIONS = 64
MAX_NAME = 4096  # bytes of UTF-8
_LENGTH = struct.Struct("<Q")


def tensor_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. Raises UsageError for a dtype or shape that the format does not have."""
    if dtype not in DTYPE_BITS:
        raise UsageError(f"no dtype {dtype[:32]!r} in a sealed file")
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n <= MAX_DATA for n in shape):
        raise UsageError("a shape is at most 64 numbers, none negative")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits > 8 * MAX_DATA:
        raise UsageError(f"{dtype} of this shape is no whole number of bytes, or too many")
    return bits // 8


@frozen
class Entry:
    """One tensor: its name, safetensors dtype and shape (elements)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __attrs_post_init__(self) -> None:
        try:
            length = len(self.name.encode())
        except UnicodeEncodeError:
            raise UsageError("a tensor's name is not valid Unicode") from None
        if length > MAX_NAME:
            raise UsageError(f"a tensor's name is longer than {MAX_NAME} bytes")
        tensor_size(self.dtype, self.shape)

    @property
    def size(self) -> int:
        return tensor_size(self.dtype, self.shape)


@frozen
class Manifest:
    """The tensors of one compartment in file order; ``metadata`` stands in the file's own section only."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]

    def places(self) -> Iterator[tuple[Entry, int]]:
        """Each tensor with its offset in the compartment, in bytes."""
        start = 0
        for entry in self.entries:
            yield entry, start
            start += align(entry.size)

    @property
    def data_size(self) -> int:
        return sum(align(entry.size) for entry in self.entries)

    def encode(self) -> bytes:
        """Length, deterministic CBOR, zeros up to a multiple of 4096. Raises UsageError when it is too large."""
        rows = [[entry.name, entry.dtype, list(entry.shape)] for entry in self.entries]
        body = cbor.encode({"tensors": rows, "metadata": dict(self.metadata)})
        size = align(_LENGTH.size + len(body))
        if size > MAX_SECTION:
            raise UsageError("too many tensors, or too much metadata, for one compartment")
        return (_LENGTH.pack(len(body)) + body).ljust(size, b"\0")

    @classmethod
    def parse(cls, section: bytes) -> Self:
        """Raises MalformedError."""
        stage = "manifest"
        if len(section) < _LENGTH.size:
            raise MalformedError(f"{stage}: it is too short")
        length = _LENGTH.unpack_from(section)[0]
        if align(_LENGTH.size + length) != len(section) or not is_zero(section[_LENGTH.size + length :]):
            raise MalformedError(f"{stage}: its length is wrong, or its padding is not zero")
        try:
            body = cbor.record(
                section[_LENGTH.size : _LENGTH.size + length],
                {"tensors": list, "metadata": dict},
                max_size=MAX_SECTION,
            )
            entries = [_entry(value) for value in body["tensors"]]
        except (MalformedError, UsageError) as error:
            raise MalformedError(f"{stage}: {error.message}") from None
        if len({entry.name for entry in entries}) != len(entries):
            raise MalformedError(f"{stage}: a name stands twice")
        pairs: Any = body["metadata"].items()
        if not all(isinstance(key, str) and isinstance(value, str) for key, value in pairs):
            raise MalformedError(f"{stage}: metadata is text")
        return cls(tuple(entries), body["metadata"])


def _entry(value: Any) -> Entry:
    if not isinstance(value, list) or [type(part) for part in value] != [str, str, list]:
        raise MalformedError("a tensor is [name, dtype, shape]")
    return Entry(value[0], value[1], tuple(value[2]))
