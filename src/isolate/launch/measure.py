"""The registers of an application, computed offline: the same function the platform measures a snapshot with.

    >>> from isolate.launch.measure import runtime_files
    >>> any(name.startswith("isolate/crypto/") for name in runtime_files())
    True
    >>> any(name.startswith("isolate/service/") for name in runtime_files())
    False

PCR1 is the runtime (interpreter, standard library, isolate's inner floors, dependencies, and the extras that the
application needs), PCR2 the application with its configuration, PCR0 both; each a SHA-384, 48 bytes.
Spec: docs/spec/evidence.md, 11.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterator, Mapping
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
MAX_CONFIGURATION_BYTES = 1024 * 1024

# The floors an enclave stands on. What is not here cannot be imported inside, and is not measured.
_INNER = ("crypto", "sealed", "attestation", "capability", "transparency", "channel", "messages", "enclave")
_INNER_FILES = ("__init__.py", "errors.py")
# What those floors need, as distributions.
_DISTRIBUTIONS = ("attrs", "blake3", "cbor2", "cffi", "cryptography", "numpy", "PyJWT", "PyNaCl")
# What an application may ask for beside that, by name: rooms of isolate, and distributions.
_EXTRAS = {"torch": (("torch",), ("torch", "typing_extensions", "sympy", "mpmath"))}
# The libraries of a torch for GPUs come as distributions of their own.
_LIBRARIES = re.compile(r"(nvidia|cuda)-[a-z0-9._-]+", re.IGNORECASE)
# Of an extra only what a process can load: torch's tree holds as many headers and tests again.
_LOADED = re.compile(r".*\.(py|so(\.\d+)*)|torch_shm_manager")
_NOT_LOADED = {"test", "tests", "include", "share"}
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


def needs(files: Mapping[str, Path]) -> tuple[str, ...]:
    """The extras that this application's isolate.toml asks for: ``[enclave] needs = ["torch"]``, sorted.

    Raises UsageError for one that is not known, or when that file is no TOML; StorageError.
    """
    if "isolate.toml" not in files:
        return ()
    path = files["isolate.toml"]
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIGURATION_BYTES + 1)
    except OSError as error:
        _unreadable(error)
    if len(text) > MAX_CONFIGURATION_BYTES:
        raise UsageError("isolate.toml is too large")
    try:
        tables = tomllib.loads(text.decode())
    except (ValueError, RecursionError):
        raise UsageError("isolate.toml is no TOML") from None
    enclave = tables.get("enclave", {})
    asked = enclave.get("needs", []) if isinstance(enclave, dict) else None
    if not isinstance(asked, list) or not all(isinstance(name, str) for name in asked):
        raise UsageError("needs in isolate.toml is a list of names")
    if unknown := sorted(set(asked) - set(_EXTRAS)):
        raise UsageError(
            f"isolate.toml needs what no runtime has: {', '.join(unknown)[:200]}",
            hint=f"known are {', '.join(sorted(_EXTRAS))}; what else you need goes into the application's folder",
        )
    return tuple(sorted(set(asked)))


@cache
def runtime_files(extras: tuple[str, ...] = ()) -> Mapping[str, Path]:
    """What a runtime snapshot holds: isolate's inner floors and their dependencies, by path inside it.

    ``extras``: what ``needs`` says. Raises UsageError when a distribution is not installed.
    """
    found: dict[str, Path] = {}
    package = Path(isolate.__file__).parent
    for name in _INNER_FILES:
        found[f"isolate/{name}"] = package / name
    for floor in (*_INNER, *(room for extra in extras for room in _EXTRAS[extra][0])):
        for path in sorted((package / floor).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"isolate/{path.relative_to(package).as_posix()}"] = path
    for name in _DISTRIBUTIONS:
        found.update(_distribution(name))
    for name in (one for extra in extras for one in _with_libraries(_EXTRAS[extra][1])):
        found.update((path, file) for path, file in _distribution(name) if _is_loaded(path))
    return dict(sorted(found.items()))


def _is_loaded(path: str) -> bool:
    *folders, name = path.split("/")
    return _LOADED.fullmatch(name) is not None and not _NOT_LOADED.intersection(folders)


def _with_libraries(names: tuple[str, ...]) -> list[str]:
    """These distributions, and the GPU libraries that they require and that are installed, at any depth."""
    found = list(names)
    for name in found:
        for requirement in _installed(name).requires or []:
            library = _LIBRARIES.match(requirement)
            if library and library.group() not in found and _is_installed(library.group()):
                found.append(library.group())
    return found


def _installed(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise UsageError(f"the dependency {name} is not installed") from None


def _is_installed(name: str) -> bool:
    return next(iter(metadata.distributions(name=name)), None) is not None


def _distribution(name: str) -> Iterator[tuple[str, Path]]:
    for entry in _installed(name).files or []:
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


class Digests:
    """SHA-384 of files in a folder that its holder alone writes: read again only when one is not the same any more.

    A file is taken for the same while device, inode, size and both times are. Whoever may write there can outwit
    that, so it is for the platform's own copies, and never for what was given to it.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], bytes]] = {}

    def __call__(self, path: Path) -> bytes:
        """48 bytes. Raises StorageError."""
        try:
            status = path.lstat()
        except OSError as error:
            _unreadable(error)
        same = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        seen, digest = self._known.get(path, ((), b""))
        if seen != same:
            # The state from before the reading: a change during it is seen the next time.
            digest = _digest(path)
            self._known[path] = (same, digest)
        return digest


def _rows(files: Mapping[str, Path], digest: Callable[[Path], bytes]) -> bytes:
    return hashlib.sha384(cbor.encode([[name, digest(path)] for name, path in sorted(files.items())])).digest()


def registers(
    runtime: Mapping[str, Path], application: Mapping[str, Path], known: Callable[[Path], bytes] = _digest
) -> Measurement:
    """The registers of these files, wherever they lie: the names count, and the bytes.

    ``known`` answers the digest (48 bytes) of a file of the runtime.
    """
    pcr1 = hashlib.sha384(cbor.encode(["isolate/runtime/v1", _platform_digest(), _rows(runtime, known)])).digest()
    pcr2 = hashlib.sha384(cbor.encode(["isolate/application/v1", _rows(application, _digest)])).digest()
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
    return registers(runtime_files(needs(files)), files)
