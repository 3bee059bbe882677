"""What a checkpoint holds beside tensors: numbers, text and containers of them, as bytes that run nothing.

    >>> from isolate.torch.checkpoint_values import decode_value, encode_value
    >>> decode_value(encode_value({"lr": 0.1, "betas": (0.9, 0.999), "epochs": [1, 2]}))
    {'lr': 0.1, 'betas': (0.9, 0.999), 'epochs': [1, 2]}

docs/spec/sealed-checkpoint.md, section 4. Stock checkpoints pickle these values, and loading one then runs what
whoever wrote the file wanted. Here a value is deterministic CBOR, which has no floats, no tuples and no maps with
keys in the user's order: those three are a map with one key, and everything else is itself.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any

from isolate.crypto import cbor
from isolate.errors import MalformedError, UsageError

FLOAT, TUPLE, DICT = "float", "tuple", "dict"
MAX_VALUE = 1 << 26  # bytes of one value
_DOUBLE = struct.Struct(">d")
_HINT = "keep str, int, float, bool, None, bytes, and lists, tuples and dicts of those; make arrays tensors"


def encode_value(value: Any) -> bytes:
    """The one encoding of a value. Raises UsageError for a type that it has no form for, with what to do."""
    encoded = cbor.encode(_pack(value, 0))
    if len(encoded) > MAX_VALUE:
        raise UsageError(f"a value in a checkpoint is at most {MAX_VALUE} bytes", hint="make it a tensor")
    return encoded


def decode_value(raw: bytes | bytearray | memoryview) -> Any:
    """The value again, every float bit by bit. Raises MalformedError."""
    return _unpack(cbor.decode(raw, max_size=MAX_VALUE))


def _pack(value: Any, depth: int) -> Any:
    kind = type(value)
    if depth > cbor.MAX_DEPTH:
        raise UsageError("a value in a checkpoint is nested too deeply")
    if value is None or kind in (bool, str, bytes):
        return value
    if kind is int:
        if not -(2**63) <= value < 2**64:
            raise UsageError("a number in a checkpoint is outside 64 bits", hint="keep it as text")
        return value
    if kind is float:
        return {FLOAT: _DOUBLE.pack(value)}
    if kind is list:
        return [_pack(item, depth + 1) for item in value]
    if kind is tuple:
        return {TUPLE: [_pack(item, depth + 1) for item in value]}
    if kind in (dict, OrderedDict):
        if any(type(key) not in (str, int) for key in value):
            raise UsageError("the keys of a dict in a checkpoint are text or numbers", hint=_HINT)
        return {DICT: [part for key, item in value.items() for part in (key, _pack(item, depth + 1))]}
    # The type's own name only: a repr could show what the object holds.
    raise UsageError(f"a checkpoint holds no {kind.__module__}.{kind.__qualname__}"[:200], hint=_HINT)


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise _malformed()
    ((kind, inner),) = value.items()
    if kind == FLOAT and type(inner) is bytes and len(inner) == _DOUBLE.size:
        return _DOUBLE.unpack(inner)[0]
    if kind == TUPLE and isinstance(inner, list):
        return tuple(_unpack(item) for item in inner)
    if kind == DICT and isinstance(inner, list) and len(inner) % 2 == 0:
        keys = inner[::2]
        if all(type(key) in (str, int) for key in keys) and len(set(keys)) == len(keys):
            return {key: _unpack(item) for key, item in zip(keys, inner[1::2], strict=True)}
    raise _malformed()


def _malformed() -> MalformedError:
    return MalformedError("checkpoint: a value in it has no form that is known here")
