"""Frozen attrs classes to plain data and back: one form for TOML and CBOR, in which bytes are hex text.

    >>> from attrs import frozen
    >>> @frozen
    ... class Pair:
    ...     digest: bytes
    ...     note: str | None = None
    >>> to_plain(Pair(b"\\x01\\x02"))
    {'digest': '0102'}
    >>> from_plain(Pair, {"digest": "0102"}, "pair") == Pair(b"\\x01\\x02")
    True

A field that is None is left out; an unknown field, a wrong type or a missing one is PolicyRefused, with its path.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import attrs

from isolate.errors import IsolateError, PolicyRefused

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Text, numbers, lists and dicts only."""
    if attrs.has(type(value)):
        members = {one.name: getattr(value, one.name) for one in attrs.fields(type(value))}
        return {name: to_plain(one) for name, one in members.items() if one is not None}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {name: to_plain(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [to_plain(one) for one in value]
    return value


def from_plain(cls: type[T], value: object, path: str) -> T:
    """An instance of ``cls`` from its plain form. Raises PolicyRefused."""
    if not isinstance(value, dict):
        raise PolicyRefused(f"{path} is no table")
    hints = typing.get_type_hints(cls)
    fields = {one.name: one for one in attrs.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(ascii(name).strip("'")[:40] for name in set(value) - set(fields))
    if unknown:
        raise PolicyRefused(f"{path} has unknown fields: {', '.join(unknown)[:200]}")
    missing = sorted(name for name, one in fields.items() if one.default is attrs.NOTHING and name not in value)
    if missing:
        raise PolicyRefused(f"{path} lacks {', '.join(missing)}")
    members = {name: _convert(hints[name], one, f"{path}.{name}") for name, one in value.items()}
    try:
        return cls(**members)
    except PolicyRefused:
        raise
    except IsolateError as error:
        raise PolicyRefused(f"{path}: {error.message}") from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # only X | None occurs
        hint = next(one for one in arguments if one is not type(None))
        return _convert(hint, value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise PolicyRefused(f"{path} is no list")
        return tuple(_convert(arguments[0], one, f"{path}[{index}]") for index, one in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise PolicyRefused(f"{path} is no table")
        if any(not isinstance(name, str) or not name.isprintable() or len(name) > 128 for name in value):
            raise PolicyRefused(f"{path} has a name that cannot be printed, or of more than 128 characters")
        return {name: _convert(arguments[1], one, f"{path}.{name}") for name, one in value.items()}
    if attrs.has(hint):
        return from_plain(hint, value, path)
    if hint is bytes:
        if not isinstance(value, str) or value != value.lower():
            raise PolicyRefused(f"{path} is no lower-case hex text")
        try:
            raw = bytes.fromhex(value)
        except ValueError:
            raw = b""
        if raw.hex() != value:
            raise PolicyRefused(f"{path} is no lower-case hex text")
        return raw
    if type(value) is not hint:
        raise PolicyRefused(f"{path} is not of type {hint.__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise PolicyRefused(f"{path} is outside 64 bits")
    if isinstance(value, str) and not value.isprintable():
        raise PolicyRefused(f"{path} has characters that cannot be printed")
    return value
