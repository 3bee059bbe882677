"""What binds the files of a sealed checkpoint: its manifest, how its files are named, and what may stand beside it.

    >>> from isolate.crypto.secret import Secret
    >>> from isolate.torch.checkpoint_manifest import CheckpointManifest, Chunk, RankFile, TensorRow, file_name
    >>> row = TensorRow("w", "F32", (4, 2), ("w",), (Chunk(0, (0, 0), (4, 2)),))
    >>> files = (RankFile(0, bytes(32), 70000),)
    >>> manifest = CheckpointManifest(bytes(16), Secret(bytes(32)), files, (row,), ())
    >>> CheckpointManifest.parse(manifest.encode()).tensors == (row,), file_name(0), row.chunks[0].key("w")
    (True, 'rank-00000.sealed', 't0,0:w')

docs/spec/sealed-checkpoint.md, sections 1 to 3. Nothing here needs torch. The files of the ranks are sealed to one
identity that is made for this checkpoint; its seed stands in the manifest and nowhere else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Self

from attrs import field, frozen

from isolate.crypto import cbor
from isolate.crypto.secret import Secret
from isolate.errors import MalformedError, NotSealed, Tampered, Truncated
from isolate.sealed.folder_manifest import ALONGSIDE
from isolate.sealed.layout import HASH_SIZE, KEY_SIZE, MAX_NUMBER, MAX_SECTION
from isolate.sealed.manifest import DTYPE_BITS

VERSION = 1
MANIFEST = "checkpoint.sealed"
TENSOR = "checkpoint"  # the one tensor of the manifest's sealed file
ID_SIZE = 16
MAX_RANKS = 100_000
MAX_DIMENSIONS = 64
_SAVE = re.compile(r"[0-9a-f]{32}/")
_PENDING = re.compile(r"\.checkpoint-[0-9a-f]{32}\.sealed")
# What stock torch and safetensors write: a folder with one of these is a plain checkpoint, or was mixed with one.
_PLAIN = (".distcp", ".metadata", ".metadata.tmp", ".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin")
_HINT = "save it with SealedStorageWriter into its own folder"


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.sealed"


def pending_name(id: bytes) -> str:
    """A manifest that is being registered with a service, and is not in its place yet."""
    return f".checkpoint-{id.hex()}.sealed"


def pending(found: Mapping[str, int]) -> list[str]:
    return sorted(name for name in found if _PENDING.fullmatch(name))


def object_key(name: str) -> str:
    """The name that a value has in its rank's file."""
    return f"o:{name}"


@frozen
class Chunk:
    """A box of a tensor, which one rank wrote: its file, and offsets and sizes in elements."""

    file: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def key(self, name: str) -> str:
        """The name that this chunk of tensor ``name`` has in its rank's file."""
        return f"t{','.join(map(str, self.offsets))}:{name}"


Path = tuple[str | int, ...] | None


@frozen
class TensorRow:
    """A tensor: name, dtype as safetensors calls it, shape, place in the nested state dict, and its chunks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    chunks: tuple[Chunk, ...]

    @property
    def complete(self) -> bool:
        """Whether the chunks have as many elements as the tensor: a gap would leave what was in memory before."""
        return sum(math.prod(chunk.sizes) for chunk in self.chunks) == math.prod(self.shape)


@frozen
class ObjectRow:
    """A value that is no tensor: name, place in the nested state dict, and the file that holds it."""

    name: str
    path: Path
    file: int


@frozen
class RankFile:
    """What a rank wrote: its number, the digest of the sealed file, and its size in bytes."""

    rank: int
    digest: bytes
    size: int


_FIELDS: dict[str, type] = {
    "version": int, "id": bytes, "key": bytes, "files": list, "tensors": list, "objects": list,
}  # fmt: skip
_FILE: dict[str, type] = {"rank": int, "digest": bytes, "size": int}


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise MalformedError(f"checkpoint: {message}")


def _sizes(value: Any) -> tuple[int, ...]:
    good = isinstance(value, list) and len(value) <= MAX_DIMENSIONS
    _need(good and all(type(n) is int and 0 <= n < 2**50 for n in value), "a shape or an offset is out of range")
    return tuple(value)


def _path(value: Any) -> Path:
    if value is None:
        return None
    good = isinstance(value, list) and 0 < len(value) <= 256
    _need(good and all(type(part) in (str, int) for part in value), "a path in the state dict is malformed")
    return tuple(value)


@frozen(eq=False)
class CheckpointManifest:
    """``id``: 16 random bytes; ``key``: the seed of the identity that opens every rank's file."""

    id: bytes
    key: Secret = field(repr=False)
    files: tuple[RankFile, ...]
    tensors: tuple[TensorRow, ...]
    objects: tuple[ObjectRow, ...]

    @property
    def folder(self) -> str:
        """The subfolder with the ranks' files."""
        return self.id.hex()

    def encode(self) -> bytes:
        def path(row: TensorRow | ObjectRow) -> list[str | int] | None:
            return None if row.path is None else list(row.path)

        return cbor.encode(
            {
                "version": VERSION,
                "id": self.id,
                "key": bytes(self.key.expose()),
                "files": [{"rank": f.rank, "digest": f.digest, "size": f.size} for f in self.files],
                "tensors": [
                    [
                        row.name, row.dtype, list(row.shape), path(row),
                        [[chunk.file, list(chunk.offsets), list(chunk.sizes)] for chunk in row.chunks],
                    ]
                    for row in self.tensors
                ],
                "objects": [[row.name, path(row), row.file] for row in self.objects],
            }
        )  # fmt: skip

    @classmethod
    def parse(cls, raw: bytes | bytearray | memoryview) -> Self:
        """Raises MalformedError: an unknown form, a chunk outside its tensor, a name twice, a file nobody has."""
        try:
            body = cbor.record(raw, _FIELDS, max_size=MAX_SECTION)
            files = tuple(RankFile(**cbor.check(value, _FILE)) for value in body["files"])
        except MalformedError as error:
            raise MalformedError(f"checkpoint: {error.message}") from None
        _need(body["version"] == VERSION, "a version that is not known here")
        _need(len(body["id"]) == ID_SIZE and len(body["key"]) == KEY_SIZE, "its id or key has a wrong length")
        _need(len(files) <= MAX_RANKS, "too many files")
        ranks = [file.rank for file in files]
        _need(ranks == sorted(set(ranks)) and all(0 <= rank < MAX_RANKS for rank in ranks), "bad numbers of ranks")
        for file in files:
            _need(len(file.digest) == HASH_SIZE and 0 < file.size < MAX_NUMBER, "a file's digest or size is bad")
        known = set(ranks)
        tensors = tuple(_tensor(value, known) for value in body["tensors"])
        objects = tuple(_object(value, known) for value in body["objects"])
        names = [row.name for row in tensors] + [row.name for row in objects]
        _need(len(set(names)) == len(names), "a name stands in it twice")
        return cls(body["id"], Secret(body["key"]), files, tensors, objects)


def _tensor(value: Any, known: set[int]) -> TensorRow:
    _need(isinstance(value, list) and len(value) == 5, "a tensor's row is malformed")
    name, dtype, shape, path, chunks = value
    good = type(name) is str and type(dtype) is str and dtype in DTYPE_BITS and isinstance(chunks, list)
    _need(good, "a tensor's row is malformed")
    row = TensorRow(name, dtype, _sizes(shape), _path(path), tuple(_chunk(one, known) for one in chunks))
    for chunk in row.chunks:
        boxes = zip(chunk.offsets, chunk.sizes, row.shape, strict=False)
        inside = len(chunk.offsets) == len(chunk.sizes) == len(row.shape)
        _need(inside and all(o + n <= whole for o, n, whole in boxes), "a chunk lies outside its tensor")
    _need(len({chunk.offsets for chunk in row.chunks}) == len(row.chunks), "a chunk stands in it twice")
    _need(row.complete, "the chunks of a tensor do not fill it")
    return row


def _chunk(value: Any, known: set[int]) -> Chunk:
    _need(isinstance(value, list) and len(value) == 3, "a chunk's row is malformed")
    _need(type(value[0]) is int and value[0] in known, "a chunk's row is malformed")
    return Chunk(value[0], _sizes(value[1]), _sizes(value[2]))


def _object(value: Any, known: set[int]) -> ObjectRow:
    _need(isinstance(value, list) and len(value) == 3, "a value's row is malformed")
    name, path, file = value
    _need(type(name) is str and type(file) is int and file in known, "a value's row is malformed")
    return ObjectRow(name, _path(path), file)


def check_folder(found: Mapping[str, int]) -> bool:
    """Whether a checkpoint stands in a folder with this listing; an empty one has none.

    Raises NotSealed for a plain checkpoint or one that was mixed with a plain one, Truncated for rank files that
    nothing binds, Tampered for anything else that does not belong there.
    """
    for name in found:
        if name.endswith(_PLAIN) or name.startswith("__"):
            raise NotSealed("checkpoint: plain files of a checkpoint stand in it", hint=_HINT)
    for name in found:
        known = name in (MANIFEST, *ALONGSIDE) or name.startswith(".") or _SAVE.fullmatch(name)
        if not known:
            raise Tampered(f"checkpoint: {name[:80]!a} stands in it, and does not belong to it")
    return MANIFEST in found or bool(pending(found))


def need_checkpoint(found: Mapping[str, int]) -> None:
    """``check_folder``, for who reads: what is not there is Truncated or NotSealed."""
    if not check_folder(found):
        if any(_SAVE.fullmatch(name) for name in found):
            raise Truncated(f"checkpoint: {MANIFEST}, which binds its files, is missing")
        raise NotSealed("this is no sealed checkpoint", hint=_HINT)


def check_files(found: Mapping[str, int], manifest: CheckpointManifest) -> None:
    """Exactly the files of the manifest stand in its subfolder, each as long as it says.

    Raises Truncated for a missing file or one of another size, Tampered for anything else that stands there.
    """
    named = {file_name(file.rank): file.size for file in manifest.files}
    for name, size in named.items():
        if name not in found:
            raise Truncated(f"checkpoint: {name} is missing")
        if found[name] != size:
            raise Truncated(f"checkpoint: {name} has another size than the manifest says")
    for name in found:
        if name not in named and not name.startswith("."):
            raise Tampered(f"checkpoint: {name[:80]!a} stands in it, and the manifest does not name it")


def leftovers(found: Mapping[str, int], keep: str) -> list[str]:
    """The subfolders of other saves: of the one before, or of one that was interrupted. Nothing reads them."""
    return [name.rstrip("/") for name in found if _SAVE.fullmatch(name) and name.rstrip("/") != keep]
