"""Where a sealed checkpoint stands: a folder of this machine or of an object store, with a subfolder for each save.

    >>> import tempfile
    >>> from isolate.torch.checkpoint_place import CheckpointPlace
    >>> place = CheckpointPlace.at(tempfile.mkdtemp())
    >>> place.write("note.sealed", b"abc")
    >>> place.list()
    {'note.sealed': 3}

docs/spec/sealed-checkpoint.md, section 1. Nothing here decides what is trusted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Self

from attrs import frozen

from isolate.errors import StorageError
from isolate.sealed.folder_manifest import LocalFolder, Place, place_of
from isolate.sealed.objects import ObjectFolder, is_url
from isolate.sealed.stores import PathLike, Source, storage_error, sync_folder


@frozen
class CheckpointPlace:
    """``path``: what the caller gave. Everything raises StorageError."""

    path: str

    @classmethod
    def at(cls, path: PathLike) -> Self:
        """Raises UsageError for a URL that is none, or holds a secret."""
        found = cls(os.fspath(path))
        if found.remote:
            place_of(found.path)
        return found

    @property
    def remote(self) -> bool:
        return is_url(self.path)

    def list(self, *, create: bool = False) -> dict[str, int]:
        """Names and sizes in bytes; folders end in a slash. ``create``: make the folder where it is missing."""
        if create and not self.remote:
            _make(Path(self.path))
        return place_of(self.path).list()

    def save(self, id: bytes, *, create: bool = False) -> Place:
        """The subfolder of one save."""
        if self.remote:
            return place_of(f"{self.path.rstrip('/')}/{id.hex()}")
        folder = Path(self.path) / id.hex()
        if create:
            _make(folder)
        return LocalFolder(folder)

    def source(self, name: str) -> Source:
        return place_of(self.path).source(name)

    def write(self, name: str, data: bytes) -> None:
        """A small file, complete and durable, or not there."""
        sink = place_of(self.path).sink(name)
        try:
            sink.write(data)
            sink.commit()
        except BaseException:
            sink.abort()
            raise

    def sync(self) -> None:
        """Make the names of new subfolders durable."""
        if not self.remote:
            try:
                sync_folder(Path(self.path))
                sync_folder(Path(self.path).resolve().parent)
            except OSError as error:
                raise storage_error(f"cannot write {self.path}", error) from None

    def remove(self, name: str) -> None:
        """A file, or a subfolder with what is in it."""
        if not self.remote:
            path = Path(self.path) / name
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(f"cannot delete {path}", error) from None
            return
        with contextlib.suppress(StorageError):
            ObjectFolder.open(self.path).delete(name)
        folder = ObjectFolder.open(f"{self.path.rstrip('/')}/{name}")
        for inner in folder.list():
            folder.delete(inner)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(f"cannot write {folder}", error) from None
