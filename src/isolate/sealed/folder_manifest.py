"""What binds the files of a sealed folder: its manifest, the key of its shards, and what may stand beside them.

    >>> from isolate.sealed.folder_manifest import FolderManifest, Shard, shard_object
    >>> from isolate.crypto.secret import Secret
    >>> rows = (Shard("model.safetensors", bytes(32), 3, 70000),)
    >>> manifest = FolderManifest(bytes(16), Secret(bytes(32)), rows)
    >>> FolderManifest.parse(manifest.encode()).shards == rows, shard_object(0)
    (True, 'shard-00001.sealed')

docs/spec/sealed-folder.md, sections 2 to 4. Shards are sealed to the folder's key only, and that key stands in the
manifest: who can open the manifest opens all, with one unwrapping, and a rewrap touches the manifest alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, Self

from attrs import field, frozen

from isolate.crypto import cbor
from isolate.crypto.aead import Cipher, Suite
from isolate.crypto.kdf import Label, derive
from isolate.crypto.secret import Secret
from isolate.errors import MalformedError, NotSealed, Tampered, Truncated, UsageError
from isolate.sealed.layout import HASH_SIZE, HEADER_SIZE, KEY_SIZE, MAX_NUMBER, MAX_SECTION
from isolate.sealed.objects import ObjectFolder, is_url
from isolate.sealed.stores import FileSink, FileSource, PathLike, Sink, Source, storage_error

VERSION = 1
MANIFEST = "folder.sealed"
INDEX = "model.safetensors.index.json"
# Tensors and compartments of the manifest, which is a sealed file itself.
FILES, SHARDS = "files", "shards"
FILE_PREFIX = "file/"
MAX_SHARDS = 99_999
MAX_NAME = 1024  # bytes of UTF-8
# May stand beside sealed files for people and repositories; nothing here reads it.
ALONGSIDE = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_HEADER = re.compile(r"(?:folder|shard-[0-9]{5})\.sealed\.[0-9a-f]{32}\.header")
_ID_SIZE = 16


def shard_object(index: int) -> str:
    """The file name of a shard; its own name is inside the manifest."""
    return f"shard-{index + 1:05d}.sealed"


def check_name(name: str) -> str:
    """A path below the folder, with slashes. Raises MalformedError for one that could lead elsewhere."""
    parts = name.split("/")
    try:
        short = len(name.encode()) <= MAX_NAME
    except UnicodeEncodeError:
        short = False
    if not short or any(part in ("", ".", "..") for part in parts) or re.search(r"[\\\x00-\x1f\x7f]", name):
        raise MalformedError("folder: a name in it is no path below it")
    return name


@frozen
class Shard:
    """One row of the manifest: name in the plain folder, digest, epoch, and size of the sealed file in bytes."""

    name: str
    digest: bytes
    epoch: int
    size: int


_FIELDS: dict[str, type] = {"version": int, "id": bytes, "key": bytes, "shards": list}
_ROW: dict[str, type] = {"name": str, "digest": bytes, "epoch": int, "size": int}


@frozen(eq=False)
class FolderManifest:
    """``id``: 16 random bytes, ``key``: opens every shard, ``shards``: all of them, in order."""

    id: bytes
    key: Secret = field(repr=False)
    shards: tuple[Shard, ...]

    def encode(self) -> bytes:
        rows = [{"name": s.name, "digest": s.digest, "epoch": s.epoch, "size": s.size} for s in self.shards]
        return cbor.encode({"version": VERSION, "id": self.id, "key": bytes(self.key.expose()), "shards": rows})

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Raises MalformedError."""
        try:
            body = cbor.record(raw, _FIELDS, max_size=MAX_SECTION)
            rows = [Shard(**cbor.check(value, _ROW)) for value in body["shards"]]
        except MalformedError as error:
            raise MalformedError(f"folder: {error.message}") from None
        sizes = (len(body["id"]), len(body["key"])) == (_ID_SIZE, KEY_SIZE)
        if body["version"] != VERSION or not sizes or len(rows) > MAX_SHARDS:
            raise MalformedError("folder: a version, key or number of shards that is not known here")
        for row in rows:
            check_name(row.name)
            if len(row.digest) != HASH_SIZE or not 0 <= row.epoch < MAX_NUMBER or not 0 < row.size < MAX_NUMBER:
                raise MalformedError("folder: a shard's digest, epoch or size is out of range")
        if len({row.name for row in rows}) != len(rows):
            raise MalformedError("folder: a shard stands twice")
        return cls(body["id"], Secret(body["key"]), tuple(rows))


@frozen(eq=False)
class ShardKey:
    """The folder's key as recipient and identity of its shards: a KeyWrapper. ``id`` is public.

    The box is AES-256-GCM under a key derived for this one context, in which the shard's random salt stands, so
    that the nonce may be zero.
    """

    label: ClassVar[str] = "symmetric"

    key: Secret = field(repr=False)
    id: bytes

    @property
    def name(self) -> str:
        return f"isolate-folder:{self.id.hex()}"

    def _cipher(self, context: bytes) -> Cipher:
        with derive(self.key, Label.SEALED_FOLDER, context) as derived:
            return Cipher(Suite.AES_256_GCM, derived)

    def wrap(self, key: Secret, context: bytes) -> bytes:
        return self._cipher(context).seal(key.expose(), bytes(12))

    def unwrap(self, blob: bytes, context: bytes) -> Secret:
        raw = self._cipher(context).open(blob, bytes(12))
        if raw is None:
            raise Tampered("unlock: the key of a shard does not open with the folder's")
        return Secret(raw)


class Place(Protocol):
    """A folder of files: on this machine, or in an object store."""

    def list(self) -> dict[str, int]:
        """Names with sizes in bytes; folders end in a slash."""
        ...

    def source(self, name: str) -> Source: ...

    def sink(self, name: str) -> Sink: ...


@frozen
class LocalFolder:
    """A folder of this machine."""

    path: Path

    def list(self) -> dict[str, int]:
        try:
            with os.scandir(self.path) as entries:
                return {
                    entry.name + ("/" if entry.is_dir() else ""): 0 if entry.is_dir() else entry.stat().st_size
                    for entry in entries
                }
        except OSError as error:
            raise storage_error(f"cannot list {self.path}", error) from None

    def source(self, name: str) -> Source:
        return FileSource(self.path / name)

    def sink(self, name: str) -> Sink:
        return FileSink(self.path / name)


def place_of(path: PathLike) -> Place:
    """The folder at a path or a URL."""
    if isinstance(path, str) and is_url(path):
        return ObjectFolder.open(path)
    return LocalFolder(Path(path))


def is_folder(path: PathLike) -> bool:
    """Whether a path is a folder, or a URL one with a manifest in it. Raises StorageError."""
    if isinstance(path, str) and is_url(path):
        return ObjectFolder.open(path).find(MANIFEST) is not None
    return Path(path).is_dir()


def manifest_of(path: PathLike) -> PathLike:
    """The file that stands for a sealed folder (inspect and rewrap take it); any other path as it is."""
    if not is_folder(path):
        return path
    return f"{path.rstrip('/')}/{MANIFEST}" if isinstance(path, str) and is_url(path) else Path(path) / MANIFEST


def check_sealed(found: Mapping[str, int]) -> None:
    """Raises NotSealed for a folder without a manifest, and for one in which plain weights stand too."""
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in found):
        raise NotSealed("folder: plain safetensors files stand in it", hint="seal it with `isolate seal DIR`")
    if MANIFEST not in found:
        if any(name.endswith(".sealed") for name in found):
            raise Truncated(f"folder: {MANIFEST}, which binds its files, is missing")
        raise NotSealed("this is no sealed folder", hint="seal it with `isolate seal DIR`")


def check_listing(found: Mapping[str, int], shards: Sequence[Shard]) -> None:
    """Exactly the files of the manifest, and what may stand beside them.

    Raises Truncated for a shard that is missing or of another size, Tampered for anything else that stands there.
    """
    named = {shard_object(index): shard.size for index, shard in enumerate(shards)}
    for number, (name, size) in enumerate(named.items(), 1):
        if name not in found:
            raise Truncated(f"folder: shard {number} of {len(named)} is missing")
        if found[name] != size:
            raise Truncated(f"folder: shard {number} of {len(named)} has another size than the manifest says")
    for name, size in found.items():
        known = name in named or name == MANIFEST or name in ALONGSIDE or name.startswith(".")
        header = _HEADER.fullmatch(name) is not None and size == HEADER_SIZE
        if not known and not header:
            raise Tampered(f"folder: {name[:80]!r} stands in it, and the manifest does not name it")


def check_empty(place: Place) -> None:
    """Raises UsageError where something stands already: nothing is overwritten, nothing is mixed."""
    if place.list():
        raise UsageError("the output folder is not empty")
