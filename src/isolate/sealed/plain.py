"""Plain safetensors files: reading one tensor by tensor, and writing one front to back.

    >>> from isolate.sealed.stores import MemorySource
    >>> head = write_header({"a": ("U8", (2,), 2)}, {"format": "np"})
    >>> plain = PlainFile(MemorySource(head + b"hi"))
    >>> plain.tensors["a"].dtype, plain.metadata
    ('U8', {'format': 'np'})

The format of the safetensors package: 8 bytes of length, a JSON header, the data. Read strictly: tensors must fill
the data without gap or overlap, as that package asks as well.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from isolate.errors import MalformedError, UsageError
from isolate.sealed.manifest import tensor_size
from isolate.sealed.stores import Source, read_exactly

MAX_HEADER = 100_000_000  # bytes, as the safetensors package has it
_LENGTH = struct.Struct("<Q")


@frozen
class PlainTensor:
    """dtype, shape, and where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class PlainFile:
    """The header of a safetensors file: ``tensors`` in data order, ``metadata`` or None."""

    def __init__(self, source: Source) -> None:
        self.source = source
        what = "this is no safetensors file"
        if source.size < _LENGTH.size:
            raise MalformedError(what)
        length = _LENGTH.unpack(read_exactly(source, 0, _LENGTH.size, "safetensors"))[0]
        if length > min(MAX_HEADER, source.size - _LENGTH.size):
            raise MalformedError(what)
        raw = read_exactly(source, _LENGTH.size, length, "safetensors")
        try:
            header = json.loads(raw.decode(), object_pairs_hook=_no_duplicates)
            self.metadata: dict[str, str] | None = header.pop("__metadata__", None)
            rows = {name: _row(value, _LENGTH.size + length) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError):
            raise MalformedError(f"{what}: its header cannot be read") from None
        if self.metadata is not None and not (
            isinstance(self.metadata, dict) and all(isinstance(value, str) for value in self.metadata.values())
        ):
            raise MalformedError(f"{what}: its metadata is not text")
        self.tensors = dict(sorted(rows.items(), key=lambda item: (item[1].offset, item[1].size)))
        end = _LENGTH.size + length
        for tensor in self.tensors.values():
            if tensor.offset != end:
                raise MalformedError(f"{what}: its tensors leave a gap or overlap")
            end += tensor.size
        if end != source.size:
            raise MalformedError(f"{what}: its tensors do not fill it")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _row(value: Any, base: int) -> PlainTensor:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    size = tensor_size(value["dtype"], shape)
    if type(begin) is not int or type(end) is not int or begin < 0 or end - begin != size or len(value) != 3:
        raise ValueError("offsets do not fit the shape")
    return PlainTensor(value["dtype"], shape, base + begin, size)


def write_header(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str] | None
) -> bytes:
    """Length and header for tensors {name: (dtype, shape, bytes)} whose data follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw = raw.ljust(-(-len(raw) // 8) * 8, b" ")
    return _LENGTH.pack(len(raw)) + raw
