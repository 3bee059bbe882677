"""Deterministic CBOR (RFC 8949, 4.2.1): one value has one encoding, and only that one is read.

    >>> from isolate.crypto import cbor
    >>> cbor.encode({"b": 1, "a": [True, b"x"]}).hex()
    'a2616182f54178616201'
    >>> cbor.decode(bytes.fromhex("a2616182f54178616201"))
    {'a': [True, b'x'], 'b': 1}

Values are None, bool, int (64 bits), bytes, str, list and dict whose keys are all str or all int. Floats and
tags are not part of our formats. Map keys are sorted by their encoded bytes: cbor2's ``canonical=True``
sorts by length first, which is the older order. docs/spec/crypto.md, section CBOR.

cbor2 writes, but does not read what comes from outside: its decoder acts on tags and hashes any key before we
can look. 180 KiB of string references made it abort the process, and 147 KB of colliding array keys took
1.6 s (docs/adr/0004-own-cbor-reader.md). The reader here knows this profile and nothing else.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cbor2

from isolate.errors import MalformedError, UsageError

MAX_DEPTH = 16  # lists and maps inside one another
# Bytes; a parser passes its own limit, and passes more only for what is authenticated: a million empty lists
# in 1 MiB cost 2 s and 75 MB.
MAX_SIZE = 1024 * 1024

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _LIST, _MAP, _TAG, _SIMPLE = range(8)
_CONSTANTS = {20: False, 21: True, 22: None}
_AS_THEY_ARE = (bytes, str)
_KEYS = (str, int)  # bool is neither, by its exact type
# The least argument that needs 1, 2, 4 or 8 bytes: a smaller one has a shorter form.
_LEAST = (24, 2**8, 2**16, 2**32)


def _ordered(value: Any, depth: int = 0) -> Any:
    """The same value with its maps in encoding order; refuses what the profile does not have."""
    # By its exact type first: most values are one of these, and a handshake encodes hundreds.
    if type(value) in _AS_THEY_ARE or value is None or isinstance(value, bool | bytes):
        return value
    if isinstance(value, int):
        if not -(2**64) <= value < 2**64:
            raise UsageError("CBOR integer is outside 64 bits")
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, list | tuple | dict):
        raise UsageError(f"no CBOR form for {type(value).__name__}")
    if depth == MAX_DEPTH:
        raise UsageError("CBOR value is nested too deeply")
    if not isinstance(value, dict):
        return [item if type(item) in _AS_THEY_ARE else _ordered(item, depth + 1) for item in value]
    try:
        keys = sorted(value, key=_text_rank)
    except TypeError:
        if any(type(key) is not int for key in value):
            raise UsageError("the keys of a CBOR map are all text or all integers") from None
        keys = sorted(value, key=_integer_rank)
    return {key: item if type(item := value[key]) in _AS_THEY_ARE else _ordered(item, depth + 1) for key in keys}


@lru_cache(1024)
def _text_rank(key: str) -> tuple[int, bytes]:
    """What orders texts as their encodings: the length stands before the text. Raises TypeError for others."""
    raw = str.encode(key)
    return len(raw), raw


def _integer_rank(key: int) -> bytes:
    encoded: bytes = cbor2.dumps(_ordered(key))
    return encoded


def encode(value: Any) -> bytes:
    """The one encoding of ``value``. Raises UsageError for a value outside the profile."""
    try:
        encoded: bytes = cbor2.dumps(_ordered(value))
    except UnicodeEncodeError:
        raise UsageError("text with half a surrogate pair has no CBOR form") from None
    return encoded


def decode(data: bytes | bytearray | memoryview, *, max_size: int = MAX_SIZE) -> Any:
    """The value that ``data`` is the one encoding of.

    Raises MalformedError when it is too large, not CBOR, has trailing bytes, or is not in deterministic form.
    """
    size = memoryview(data).nbytes
    if size > max_size:
        raise MalformedError(f"CBOR of {size} bytes, where at most {max_size} are read")
    raw = bytes(data)
    value, end = _read(raw, 0, 0)
    if end != size:
        raise _malformed("trailing bytes")
    return value


def _malformed(why: str) -> MalformedError:
    return MalformedError(f"not deterministic CBOR: {why}")


def _head(raw: bytes, at: int) -> tuple[int, int, int]:
    """Major type, argument, and where the next byte is."""
    if at >= len(raw):
        raise _malformed("it ends too early")
    major, argument, at = raw[at] >> 5, raw[at] & 31, at + 1
    if argument < 24:
        return major, argument, at
    if argument > 27 or major == _SIMPLE:
        raise _malformed("an indefinite length, a float or a simple value")
    index = argument - 24
    end = at + (1 << index)
    if end > len(raw):
        raise _malformed("it ends too early")
    argument = int.from_bytes(raw[at:end])
    if argument < _LEAST[index]:
        raise _malformed("an integer or length that has a shorter form")
    return major, argument, end


def _read(raw: bytes, at: int, depth: int) -> tuple[Any, int]:
    if at < len(raw) and raw[at] & 31 < 24:
        major, argument, at = raw[at] >> 5, raw[at] & 31, at + 1
    else:
        major, argument, at = _head(raw, at)
    if major == _UNSIGNED:
        return argument, at
    if major == _NEGATIVE:
        return -1 - argument, at
    if major in (_BYTES, _TEXT):
        end = at + argument
        if end > len(raw):
            raise _malformed("it ends too early")
        if major == _BYTES:
            return raw[at:end], end
        try:
            return raw[at:end].decode(), end
        except UnicodeDecodeError:
            raise _malformed("text that is not UTF-8") from None
    if major == _SIMPLE and argument in _CONSTANTS:
        return _CONSTANTS[argument], at
    if major in (_TAG, _SIMPLE):
        raise _malformed("a tag or a simple value")
    if depth == MAX_DEPTH:
        raise _malformed("nested too deeply")
    return _read_list(raw, at, argument, depth + 1) if major == _LIST else _read_map(raw, at, argument, depth + 1)


def _read_list(raw: bytes, at: int, count: int, depth: int) -> tuple[list[Any], int]:
    items = []
    for _ in range(count):
        item, at = _read(raw, at, depth)
        items.append(item)
    return items, at


def _read_map(raw: bytes, at: int, count: int, depth: int) -> tuple[dict[Any, Any], int]:
    entries: dict[Any, Any] = {}
    kind, last = None, b""
    for _ in range(count):
        key, end = _read(raw, at, depth)
        if type(key) is not kind:
            if kind is not None or type(key) not in _KEYS:
                raise _malformed("the keys of a map are all text or all integers")
            kind = type(key)
        # Strictly increasing: in order, and none twice.
        encoded = raw[at:end]
        if encoded <= last:
            raise _malformed("the keys of a map are out of order or repeated")
        last = encoded
        entries[key], at = _read(raw, end, depth)
    return entries, at


def record(
    data: bytes | bytearray | memoryview, fields: dict[str, type], *, max_size: int = MAX_SIZE
) -> dict[str, Any]:
    """Decode a map that has exactly these text keys, each value of exactly this type.

    >>> record(encode({"n": 1}), {"n": int})
    {'n': 1}
    """
    return check(decode(data, max_size=max_size), fields)


def check(value: Any, fields: dict[str, type]) -> dict[str, Any]:
    """The same for a value that is already decoded. Raises MalformedError naming the field."""
    if not isinstance(value, dict):
        raise MalformedError("a map is expected")
    if set(value) != set(fields):
        # In ASCII with escapes: a field name that a peer chose ends in a log or on a terminal.
        odd = sorted(ascii(key) for key in set(value) ^ set(fields))
        raise MalformedError(f"missing or unknown fields: {', '.join(odd)[:200]}")
    for name, kind in fields.items():
        # bool is an int to isinstance, never to us.
        if type(value[name]) is not kind and kind is not object:
            raise MalformedError(f"field {name} is not {kind.__name__}")
    return value
