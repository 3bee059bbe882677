"""The registers of an application, computed offline: the same function the platform measures a snapshot with.

    >>> from isolate.launch.measure import runtime_files
    >>> any(name.startswith("isolate/crypto/") for name in runtime_files())
    True
    >>> any(name.startswith("isolate/service/") for name in runtime_files())
    False

PCR1 is the runtime (interpreter, standard library, isolate's inner floors, dependencies), PCR2 the
application with its configuration, PCR0 both; each a SHA-384, 48 bytes. Spec: docs/spec/evidence.md.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from attrs import frozen

import isolate
from isolate.crypto import cbor
from isolate.errors import StorageError, UsageError

MAX_APPLICATION_FILES = 10_000
MAX_APPLICATION_BYTES = 1024 * 1024 * 1024

# The floors an enclave stands on. What is not here cannot be imported inside, and is not measured.
_INNER = ("crypto", "sealed", "attestation", "capability", "transparency", "channel", "messages", "enclave")
_INNER_FILES = ("__init__.py", "errors.py")
# What those floors need, as distributions.
_DISTRIBUTIONS = ("attrs", "blake3", "cbor2", "cffi", "cryptography", "numpy", "PyJWT", "PyNaCl")
# Parts of the standard library that no enclave loads and that vary from build to build.
_NO_STDLIB = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "idlelib",
    "ensurepip",
    "tkinter",
    "turtledemo",
}


@frozen
class Measurement:
    """``registers``: name to 48 bytes."""

    registers: Mapping[str, bytes]

    def lines(self) -> list[str]:
        return [f"{name} {value.hex()}" for name, value in sorted(self.registers.items())]


def tree(root: Path) -> dict[str, Path]:
    """Every regular file under ``root``, by its path with slashes. Raises UsageError for links and devices."""
    if not root.is_dir():
        raise UsageError(f"{root} is no folder with an application")
    found: dict[str, Path] = {}
    total = 0
    for folder, folders, files in os.walk(root, onerror=_unreadable, followlinks=False):
        folders[:] = sorted(name for name in folders if name not in ("__pycache__", ".git"))
        for path in [Path(folder, name) for name in folders]:
            # A link to a folder is not walked into: what lies behind it would be neither measured nor there.
            if path.is_symlink():
                raise UsageError(f"{path} is a link: an application holds only files and folders")
        for name in sorted(files):
            path = Path(folder, name)
            try:
                status = path.lstat()
            except OSError as error:
                _unreadable(error)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path} is no regular file: an application holds only files and folders")
            total += status.st_size
            found[path.relative_to(root).as_posix()] = path
            if len(found) > MAX_APPLICATION_FILES or total > MAX_APPLICATION_BYTES:
                raise UsageError(f"the application {root} is too large to be measured")
    if not found:
        raise UsageError(f"{root} is no folder with an application")
    return found


def _unreadable(error: OSError) -> NoReturn:
    raise StorageError(f"cannot read {error.filename}: {error.strerror}") from None


@cache
def runtime_files() -> Mapping[str, Path]:
    """What a runtime snapshot holds: isolate's inner floors and their dependencies, by path inside it."""
    found: dict[str, Path] = {}
    package = Path(isolate.__file__).parent
    for name in _INNER_FILES:
        found[f"isolate/{name}"] = package / name
    for floor in _INNER:
        for path in sorted((package / floor).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"isolate/{path.relative_to(package).as_posix()}"] = path
    for name in _DISTRIBUTIONS:
        found.update(_distribution(name))
    return dict(sorted(found.items()))


def _distribution(name: str) -> Iterator[tuple[str, Path]]:
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        raise UsageError(f"the dependency {name} is not installed") from None
    for entry in files:
        parts = entry.parts
        if ".." in parts or "__pycache__" in parts or "tests" in parts or parts[0].endswith(".dist-info"):
            continue
        path = Path(str(entry.locate()))
        if path.is_file():
            yield entry.as_posix(), path


@cache
def _platform_digest() -> bytes:
    """The interpreter and its standard library, which stay where they are and are hashed in place."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: list[list[object]] = [["version", sys.version]]
    rows.append(["interpreter", _digest(Path(sys.executable).resolve())])
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
        rows.append(["library", _digest(library.resolve())])
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if name not in _NO_STDLIB)
        for name in sorted(files):
            if name.endswith((".py", ".so")):
                path = Path(folder, name)
                rows.append([path.relative_to(root).as_posix(), _digest(path)])
    return hashlib.sha384(cbor.encode(rows)).digest()


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha384").digest()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None


def _rows(files: Mapping[str, Path]) -> bytes:
    return hashlib.sha384(cbor.encode([[name, _digest(path)] for name, path in sorted(files.items())])).digest()


def registers(runtime: Mapping[str, Path], application: Mapping[str, Path]) -> Measurement:
    """The registers of these files, wherever they lie: the names count, and the bytes."""
    pcr1 = hashlib.sha384(cbor.encode(["isolate/runtime/v1", _platform_digest(), _rows(runtime)])).digest()
    pcr2 = hashlib.sha384(cbor.encode(["isolate/application/v1", _rows(application)])).digest()
    pcr0 = hashlib.sha384(cbor.encode(["isolate/image/v1", pcr1, pcr2])).digest()
    return Measurement({"PCR0": pcr0, "PCR1": pcr1, "PCR2": pcr2})


def measure(application: str | os.PathLike[str]) -> Measurement:
    """What the platform of this Python will say of this application, without launching it.

    Raises UsageError when it is no application folder, StorageError when a file cannot be read.
    """
    root = Path(application)
    files = tree(root)
    if "isolate.toml" not in files:
        raise UsageError(f"{root} has no isolate.toml", hint="see docs/spec/evidence.md, section on applications")
    return registers(runtime_files(), files)
