"""How limits, times and arguments are typed on a command line, for `isolate grant`, `delegate` and `invoke`.

>>> rates(("60=10", "86400=1000")), outputs(("label=10", "vector=8,16", "handle"))
({60: 10, 86400: 1000}, {'label': (10,), 'vector': (8, 16), 'handle': ()})
>>> parameters(("search.top=1..5", "search.field=title,author"))["search"]["top"]
Range(least=1, most=5)
>>> moment("30d", now=0), moment("2026-12-01", now=0), moment("1800000000", now=0)
(2592000, 1796083200, 1800000000)
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

from isolate.capability.scope import OUTPUT_KINDS, Choices, Constraint, Range
from isolate.crypto.signing import VerifyingKey
from isolate.errors import StorageError, UsageError
from isolate.messages.base import MAX_MESSAGE

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_FLOAT = re.compile(r"-?[0-9]+\.[0-9]+([eE][-+]?[0-9]+)?")
_SPAN = re.compile(r"([0-9]{1,9})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a scope but its operations, under the names of ``Owner.grant`` and ``Handle.attenuate``."""
    number = click.IntRange(0, 2**63 - 1)
    for option in reversed((
        click.option("--uses", type=number, metavar="N", help="Invocations in all."),
        click.option("--bytes-out", type=number, metavar="N", help="Bytes in all that may leave, with padding."),
        click.option("--rate", "rates", multiple=True, metavar="S=N", help="N uses in any S seconds (repeat)."),
        click.option(
            "--parameter", "parameters", multiple=True, metavar="OP.NAME=A..B|X,Y",
            help="What an argument may be: a range, or choices (repeat).",
        ),
        click.option(
            "--result", "outputs", multiple=True, metavar="KIND=SIZES",
            help="Only results of these kinds: label=N, scalar=BITS, text=TOKENS, vector=N,BITS, handle (repeat).",
        ),
        click.option("--minimum-group", type=number, metavar="N", help="Distinct people behind each aggregate."),
        click.option("--not-before", metavar="T", help="Not valid before."),
        click.option("--expires", metavar="T", help="Valid until: 30d, 12h, 2026-12-01, or Unix seconds."),
        click.option("--depth", type=click.IntRange(0, 7), metavar="N", help="How often it may be passed on."),
        click.option("--lease", type=number, metavar="N", help="Uses that an enclave may take at once (see docs)."),
    )):  # fmt: skip
        command = option(command)
    return command


def scope_limits(given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``Owner.grant`` and ``Handle.attenuate`` from those options. Raises UsageError."""
    now = int(time.time())
    return {
        **{name: given[name] for name in ("uses", "bytes_out", "minimum_group", "depth", "lease")},
        "rates": rates(given["rates"]) or None,
        "parameters": parameters(given["parameters"]) or None,
        "outputs": outputs(given["outputs"]) or None,
        "not_before": moment(given["not_before"], now=now) if given["not_before"] else None,
        "expires": moment(given["expires"], now=now) if given["expires"] else None,
    }


def _pairs(texts: Iterable[str], what: str) -> Iterable[tuple[str, str]]:
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError(what)
        yield name, value


def _integer(text: str, what: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise UsageError(what)
    return int(text)


def operations(texts: Iterable[str]) -> dict[str, bytes]:
    """``NAME=DIGEST``, the digest in 64 hexadecimal digits."""
    what = "--operation takes NAME=DIGEST, as `isolate measure APP --operations FILE` prints them"
    found: dict[str, bytes] = {}
    for name, digest in _pairs(texts, what):
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise UsageError(what)
        found[name] = bytes.fromhex(digest)
    return found


def rates(texts: Iterable[str]) -> dict[int, int]:
    """``SECONDS=USES``."""
    what = "--rate takes SECONDS=USES"
    return {_integer(seconds, what): _integer(uses, what) for seconds, uses in _pairs(texts, what)}


def parameters(texts: Iterable[str]) -> dict[str, dict[str, Constraint]]:
    """``OPERATION.NAME=LEAST..MOST``, or ``=CHOICE,CHOICE``, where digits alone are an integer."""
    what = "--parameter takes OPERATION.NAME=LEAST..MOST, or =CHOICE,CHOICE"
    found: dict[str, dict[str, Constraint]] = {}
    for name, value in _pairs(texts, what):
        # An operation's name may have dots, a parameter's has none.
        operation, dot, parameter = name.rpartition(".")
        if not dot:
            raise UsageError(what)
        least, dots, most = value.partition("..")
        constraint: Constraint = (
            Range(_integer(least, what), _integer(most, what))
            if dots
            else Choices([int(one) if _INTEGER.fullmatch(one) else one for one in value.split(",")])
        )
        found.setdefault(operation, {})[parameter] = constraint
    return found


def outputs(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """``KIND=SIZE,SIZE``; ``handle`` has no size."""
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        kind, _, sizes = text.partition("=")
        what = f"--result takes {', '.join(OUTPUT_KINDS)}, each with its sizes"
        found[kind] = tuple(_integer(size, what) for size in sizes.split(",")) if sizes else ()
    return found


def moment(text: str, *, now: int) -> int:
    """Unix seconds: from a span after ``now`` (``90m``, ``30d``), a date or time (UTC), or those seconds."""
    if text.isascii() and text.isdigit():
        return int(text)
    if span := _SPAN.fullmatch(text):
        return now + int(span[1]) * _SECONDS[span[2]]
    try:
        found = datetime.fromisoformat(text)
        return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise UsageError(f"{text[:40]!r} is no time", hint="30d, 12h, 2026-12-01, or Unix seconds") from None


def holder(text: str) -> bytes:
    """The Ed25519 key (32 bytes) of a verifying key. Raises KeyFormatError."""
    return VerifyingKey.parse(text).ed25519


def argument(text: str) -> Any:
    """The value of an argument: a number, a text, ``@file`` (an array of .npy, a reference of
    .json, else bytes), or ``text:`` and a text.

    >>> argument("3"), argument("left"), argument("text:3")
    (3, 'left', '3')
    """
    if text.startswith("@"):
        return _from_file(Path(text[1:]))
    if text.startswith("text:"):
        return text.removeprefix("text:")
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _reference(path: Path, body: bytes) -> dict[str, Any]:
    """A reference to a derived asset (docs/spec/operations.md, 6), as `isolate invoke` printed it."""
    try:
        found = json.loads(body)
        digest, handle = bytes.fromhex(found["digest"]), bytes.fromhex(found["handle"])
        if set(found) == {"asset", "digest", "handle"} and type(found["asset"]) is str:
            return {"asset": found["asset"], "digest": digest, "handle": handle}
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UsageError(f"{path} holds no reference to a derived asset")


def _from_file(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            body = file.read(MAX_MESSAGE + 1)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None
    if len(body) > MAX_MESSAGE:
        raise UsageError(f"{path} is longer than the {MAX_MESSAGE} bytes that one request may have")
    if path.suffix == ".json":
        return _reference(path, body)
    if path.suffix != ".npy":
        return body
    try:
        return np.load(io.BytesIO(body), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError):
        raise UsageError(f"{path} holds no array of numbers") from None
