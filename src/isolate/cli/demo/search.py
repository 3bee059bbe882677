"""What the operator could have seen: a search for secrets, in every form they could lie about in.

    >>> import numpy as np
    >>> secret = np.linspace(0.1, 0.9, 40, dtype=np.float32)
    >>> needles = needles_of("weights", secret)
    >>> sorted({needle.form for needle in needles})
    ['base64', 'decimal', 'fp16', 'fp32', 'hex']
    >>> {found.form for found in find(needles, b"..." + secret.tobytes().hex().encode())}
    {'hex'}

A needle is a window of a secret in one form. Windows that say nothing (few distinct values) are left out: they
would be found by chance.
"""

from __future__ import annotations

import base64
import filecmp
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

FORMS = ("fp32", "fp16", "base64", "hex", "decimal")
WINDOW = 12  # elements
WINDOWS = 3  # per secret


@frozen
class Needle:
    secret: str
    form: str
    value: bytes


def encoded(array: np.ndarray[Any, Any]) -> dict[str, bytes]:
    """A whole array in each form, as a careless program would write it."""
    single = np.ascontiguousarray(array, dtype="<f4")
    raw = single.tobytes()
    return {
        "fp32": raw,
        "fp16": single.astype("<f2").tobytes(),
        "base64": base64.b64encode(raw),
        "hex": raw.hex().encode(),
        "decimal": _decimal(array).encode(),
    }


def _decimal(array: np.ndarray[Any, Any]) -> str:
    return ", ".join(str(value) for value in array.ravel().tolist())


def needles_of(secret: str, array: np.ndarray[Any, Any]) -> list[Needle]:
    """Windows of the array that are telling, in each form. Base64 has three alignments."""
    flat = np.ascontiguousarray(array).ravel()
    starts = [
        at for at in range(0, flat.size - WINDOW + 1, WINDOW) if len(set(flat[at : at + WINDOW].tolist())) > 6
    ]
    needles: list[Needle] = []
    for at in [starts[number * len(starts) // WINDOWS] for number in range(min(WINDOWS, len(starts)))]:
        window = flat[at : at + WINDOW]
        forms = encoded(window)
        needles += [Needle(secret, form, forms[form]) for form in ("fp32", "fp16", "hex", "decimal")]
        if flat.dtype.kind in "ui":
            needles.append(Needle(secret, "bytes", window.tobytes()))
        for shift in range(3):
            # Without the first and last group, which also hold neighbours' bits.
            body = base64.b64encode(bytes(shift) + forms["fp32"])[4:-4]
            needles.append(Needle(secret, "base64", body))
    return needles


def canary(text: bytes) -> list[Needle]:
    """A planted text, as it is, in hex and in base64."""
    forms = [("bytes", text), ("hex", text.hex().encode())]
    forms += [("base64", base64.b64encode(bytes(shift) + text)[4:-4]) for shift in range(3)]
    return [Needle("canary", form, value) for form, value in forms]


def find(needles: Iterable[Needle], haystack: bytes) -> list[Needle]:
    return [needle for needle in needles if needle.value in haystack]


def search(
    needles: list[Needle], files: Iterable[Path], public: Mapping[str, Path]
) -> tuple[int, list[tuple[Path, Needle]]]:
    """Search files whole: how many bytes there were, and what was found where.

    ``public`` maps paths inside a runtime snapshot to the installed files they are copies of: a file that is equal
    to the public one is compared, and not searched.
    """
    hits: list[tuple[Path, Needle]] = []
    total = 0
    for path in files:
        original = next((public[name] for name in _tails(path) if name in public), None)
        try:
            if original is None or not filecmp.cmp(path, original, shallow=False):
                hits += [(path, needle) for needle in find(needles, path.read_bytes())]
            total += path.stat().st_size
        except FileNotFoundError:
            # In the machine's temporary folder other programs come and go.
            continue
    return total, hits


def _tails(path: Path) -> Iterator[str]:
    parts = path.parts
    for at in range(len(parts)):
        if parts[at - 1] == "runtime":
            yield "/".join(parts[at:])
