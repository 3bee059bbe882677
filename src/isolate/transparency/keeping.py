"""The last believed checkpoint as a file: what a client remembers, and what a service is held to at its start.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "seen")
    ...     print(read_checkpoint(path))
    ...     write_checkpoint(path, "a signed note\\n")
    ...     print(read_checkpoint(path), end="")
    None
    a signed note

It holds the note and nothing else, and no secret. Reading it verifies nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from isolate.errors import LogRefused, StorageError
from isolate.transparency.checkpoint import MAX_NOTE


def is_before(text: str, name: str, epoch: int) -> bool:
    """Whether this note is of an earlier epoch of the service of this name, by its first line.

    >>> is_before("isolate/acme/1\\n7\\n", "acme", 2), is_before("isolate/acme/2\\n7\\n", "acme", 2)
    (True, False)
    """
    start, _, number = text.partition("\n")[0].rpartition("/")
    return start == f"isolate/{name}" and number.isascii() and number.isdecimal() and int(number) < epoch


def read_checkpoint(path: str | os.PathLike[str]) -> str | None:
    """The note, or None where there is no file. Raises StorageError, and LogRefused for what is no text."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_NOTE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {os.fspath(path)}: {error.strerror}") from None
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise LogRefused(f"{os.fspath(path)} holds no checkpoint") from None


def write_checkpoint(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file in one step, synced: it then holds the old note or the new one. Raises StorageError."""
    target, temporary = Path(path), ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                Path(temporary).unlink(missing_ok=True)
        raise StorageError(f"cannot write {os.fspath(path)}: {error.strerror}") from None
