"""Deterministic CBOR (RFC 8949, 4.2.1): one value has one encoding, and only that one is read.

    >>> from isolate.crypto import cbor
    >>> cbor.encode({"b": 1, "a": [True, b"x"]}).hex()
    'a2616182f54178616201'
    >>> cbor.decode(bytes.fromhex("a2616182f54178616201"))
    {'a': [True, b'x'], 'b': 1}

Values are None, bool, int (64 bits), bytes, str, list and dict whose keys are all str or all int. Floats and
tags are not part of our formats. Map keys are sorted by their encoded bytes: cbor2's ``canonical=True``
sorts by length first, which is the older order.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, TypeVar

import cbor2

from isolate.errors import MalformedError, UsageError

MAX_DEPTH = 16
MAX_SIZE = 16 * 1024 * 1024  # bytes; a parser with a tighter limit passes its own

T = TypeVar("T")


def _ordered(value: Any, depth: int = 0) -> Any:
    """The same value with its maps in encoding order; refuses what the profile does not have."""
    if depth > MAX_DEPTH:
        raise UsageError("CBOR value is nested too deeply")
    if value is None or isinstance(value, bool | bytes):
        return value
    if isinstance(value, int):
        if not -(2**64) <= value < 2**64:
            raise UsageError("CBOR integer is outside 64 bits")
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, list | tuple):
        return [_ordered(item, depth + 1) for item in value]
    if isinstance(value, dict):
        kinds = {str if isinstance(key, str) else type(key) for key in value}
        if kinds - {str} and kinds - {int}:
            raise UsageError("the keys of a CBOR map are all text or all integers")
        keyed = sorted((cbor2.dumps(key), key) for key in value)
        return {key: _ordered(value[key], depth + 1) for _, key in keyed}
    raise UsageError(f"no CBOR form for {type(value).__name__}")


def encode(value: Any) -> bytes:
    """The one encoding of ``value``. Raises UsageError for a value outside the profile."""
    encoded: bytes = cbor2.dumps(_ordered(value))
    return encoded


def decode(data: bytes | bytearray | memoryview, *, max_size: int = MAX_SIZE) -> Any:
    """The value that ``data`` is the one encoding of.

    Raises MalformedError when it is too large, not CBOR, has trailing bytes, or is not in deterministic form.
    """
    if len(data) > max_size:
        raise MalformedError(f"CBOR of {len(data)} bytes, where at most {max_size} are read")
    raw = bytes(data)
    stream = BytesIO(raw)
    try:
        value = cbor2.CBORDecoder(
            stream, max_depth=MAX_DEPTH, allow_indefinite=False, allow_duplicate_keys=False
        ).decode()
        canonical = stream.tell() == len(raw) and encode(value) == raw
    # cbor2 raises several unrelated types on hostile input; none of them may leave, nor be chained.
    except Exception:  # noqa: BLE001
        canonical = False
        value = None
    if not canonical:
        raise MalformedError("not deterministic CBOR")
    return value


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
        odd = sorted(str(key) for key in set(value) ^ set(fields))
        raise MalformedError(f"missing or unknown fields: {', '.join(odd)[:200]}")
    for name, kind in fields.items():
        # bool is an int to isinstance, never to us.
        if type(value[name]) is not kind and kind is not object:
            raise MalformedError(f"field {name} is not {kind.__name__}")
    return value
