"""A Hugging Face folder, sealed: config, tokenizer, index and every shard, bound by one manifest.

    >>> import json, pathlib, tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file as save_plain
    >>> from isolate import Identity, SigningKey
    >>> owner, identity = SigningKey.generate(), Identity.generate()
    >>> plain = pathlib.Path(tempfile.mkdtemp())
    >>> save_plain({"w": np.eye(2, dtype=np.float32)}, plain / "model.safetensors")
    >>> _ = (plain / "config.json").write_text(json.dumps({"hidden_size": 2}))
    >>> target = plain.parent / (plain.name + ".sealed")
    >>> digest = seal_folder(plain, target, recipients=[identity.recipient], sign=owner)
    >>> with open_folder(target, identity=identity, signed_by=owner.verifying_key) as folder:
    ...     folder.config["hidden_size"], folder.files, folder.state_dict()["w"].tolist()
    (2, ('config.json',), [[1.0, 0.0], [0.0, 1.0]])

docs/spec/sealed-folder.md. In an enclave (workload mode) ``identity`` is the workload: one release, of the
manifest, opens the folder. An owner opens it with its own identity. What stands in the folder in plain is never
read: a folder that holds plain weights, or anything that its manifest does not name, is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from isolate.crypto.aead import Suite
from isolate.crypto.secret import Secret, wipe
from isolate.crypto.signing import SigningKey, VerifyingKey
from isolate.errors import IsolateError, MalformedError, RolledBack, StorageError, UsageError
from isolate.sealed.directory import Epoch, PublicFacts
from isolate.sealed.folder_manifest import (
    FILE_PREFIX,
    FILES,
    INDEX,
    MANIFEST,
    MAX_SHARDS,
    SHARDS,
    FolderManifest,
    LocalFolder,
    Place,
    Shard,
    ShardKey,
    check_empty,
    check_listing,
    check_name,
    check_sealed,
    place_of,
    shard_object,
)
from isolate.sealed.layout import KEY_SIZE
from isolate.sealed.objects import ObjectFolder, is_url
from isolate.sealed.plain import PlainFile
from isolate.sealed.reader import Piece, SealedReader
from isolate.sealed.recipients import AnyIdentity, AnyRecipient
from isolate.sealed.safetensors import safe_open, seal_file, unseal_file
from isolate.sealed.stores import FileSink, FileSource, PathLike, Sink, Source, storage_error, sync_folder
from isolate.sealed.writer import Progress, SealedWriter

_WEIGHTS = ".safetensors"
_BATCH = 16 << 20  # bytes of plaintext at once, when a file is copied
_MAX_JSON = 1 << 26  # bytes of an index or a config
# What libraries call the files of a tokenizer.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip


def seal_folder(
    folder: PathLike,
    target: PathLike,
    *,
    recipients: Sequence[AnyRecipient],
    sign: SigningKey,
    model_id: str = "",
    epoch: int = 0,
    previous: bytes | None = None,
    suite: Suite | None = None,
    progress: Progress | None = None,
) -> bytes:
    """Seal every file below ``folder`` into ``target``, a path or URL where nothing stands yet.

    Answers the digest of the manifest (32 bytes): the folder's digest, for ``expect=``. Names that begin with a dot
    are left out. A local target appears complete or not at all; in a store the manifest comes last. Raises
    UsageError, MalformedError (an index that does not fit its shards), StorageError, what a KeyWrapper raises.
    """
    root = Path(folder)
    names = _names(root)
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    _check_index(root, weights)
    key, folder_id, done = Secret(secrets.token_bytes(KEY_SIZE)), secrets.token_bytes(16), 0
    facts: dict[str, Any] = {"sign": sign, "model_id": model_id, "epoch": epoch, "suite": suite}
    with key, _appearing(target) as place:
        digests = []
        for index, name in enumerate(weights):
            digest = seal_file(
                root / name, place.sink(shard_object(index)), recipients=[ShardKey(key, folder_id)],
                progress=_shifted(progress, done), **facts,
            )  # fmt: skip
            digests.append(digest)
            done += _size(root / name)
        sizes = place.list()
        rows = [
            Shard(name, digest, epoch, sizes.get(shard_object(index), 0))
            for index, (name, digest) in enumerate(zip(weights, digests, strict=True))
        ]
        manifest = FolderManifest(folder_id, key, tuple(rows))
        files = [name for name in names if name not in set(weights)]
        return _seal_manifest(root, files, manifest, place, recipients, previous, facts)


def _seal_manifest(
    root: Path, files: Sequence[str], manifest: FolderManifest, place: Place, recipients: Sequence[AnyRecipient],
    previous: bytes | None, facts: Mapping[str, Any],
) -> bytes:  # fmt: skip
    globs = {SHARDS: [SHARDS]} | ({FILES: [FILE_PREFIX + "*"]} if files else {})
    raw = bytearray(manifest.encode())
    writer = SealedWriter(
        place.sink(MANIFEST), recipients=recipients, compartments=globs, previous=previous, **facts
    )
    try:
        with writer:
            writer.add_from(SHARDS, "U8", (len(raw),), lambda offset, view: _copy(raw, offset, view))
            for name in files:
                with FileSource(root / name) as source:
                    writer.add_from(FILE_PREFIX + name, "U8", (source.size,), _exactly(source))
        return writer.close()
    finally:
        wipe(raw)


def _copy(raw: bytearray, offset: int, view: memoryview) -> None:
    view[:] = raw[offset : offset + len(view)]


def _exactly(source: FileSource) -> Any:
    def read(offset: int, view: memoryview) -> None:
        if source.read_into(offset, view) != len(view):
            raise StorageError(f"{source.path} became shorter while it was read")

    return read


def _shifted(progress: Progress | None, base: int) -> Progress | None:
    return None if progress is None else lambda done: progress(base + done)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise storage_error(f"cannot read {path}", error) from None


def folder_size(folder: PathLike) -> int:
    """Bytes of the safetensors files that ``seal_folder`` would read."""
    root = Path(folder)
    return sum(_size(root / name) for name in _names(root) if name.endswith(_WEIGHTS))


def _names(root: Path) -> list[str]:
    """Every file below ``root``, sorted; refuses what is sealed already."""
    if not root.is_dir():
        raise UsageError(f"{root} is no folder")

    def fail(error: OSError) -> None:
        raise storage_error(f"cannot list {root}", error) from None

    found = []
    for path, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [(Path(path) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    if any(name.endswith(".sealed") for name in found):
        raise UsageError("something in this folder is sealed already")
    if not found:
        raise UsageError("there is nothing in this folder")
    try:
        return sorted(check_name(name) for name in found)
    except MalformedError as error:
        raise UsageError(error.message) from None


def _weight_map(raw: bytes) -> dict[str, str]:
    """{tensor: shard} of an index. Raises MalformedError."""
    try:
        found = json.loads(raw)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise MalformedError(f"folder: {INDEX} has no map of weights")
    return found


def _check_index(root: Path, weights: Sequence[str]) -> None:
    """The index names shards that are there, and exactly their tensors; a slip here would surface at opening."""
    if not weights:
        raise UsageError("there is no safetensors file in this folder")
    if len(weights) > MAX_SHARDS:
        raise UsageError(f"more than {MAX_SHARDS} shards")
    path = root / INDEX
    if not path.exists():
        return
    if _size(path) > _MAX_JSON:
        raise MalformedError(f"folder: {INDEX} is too long")
    try:
        wanted = _weight_map(path.read_bytes())
    except OSError as error:
        raise storage_error(f"cannot read {path}", error) from None
    for name in sorted(set(wanted.values())):
        if name not in weights:
            raise MalformedError(f"folder: {INDEX} names {name[:80]!r}, which is not there")
        with FileSource(root / name) as source:
            if set(PlainFile(source).tensors) != {key for key, value in wanted.items() if value == name}:
                raise MalformedError(f"folder: {INDEX} and {name[:80]!r} do not hold the same tensors")


@contextlib.contextmanager
def _appearing(target: PathLike, mode: int = 0o777) -> Iterator[Place]:
    """A folder to write into. A local one gets its name at the end; in a store, what was written is deleted after
    an error."""
    if isinstance(target, str) and is_url(target):
        store = ObjectFolder.open(target)
        check_empty(store)
        try:
            yield store
        except BaseException:
            with contextlib.suppress(IsolateError):
                for name in store.list():
                    if name.endswith(".sealed"):  # ours: the folder was empty
                        store.delete(name)
            raise
        return
    final = Path(target)
    partial = final.parent / f".{final.name[:64]}.{secrets.token_hex(6)}.partial"
    if final.exists():
        check_empty(LocalFolder(final))
    try:
        partial.mkdir(mode)
    except OSError as error:
        raise storage_error(f"cannot write {final}", error) from None
    try:
        yield LocalFolder(partial)
        try:
            sync_folder(partial)
            partial.rename(final)
            sync_folder(final.parent)
        except OSError as error:
            raise storage_error(f"cannot write {final}", error) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class SealedFolder:
    """An opened folder; ``open_folder`` makes it. One shard is open at a time. Threads take one each.

    ``facts``: PublicFacts of the manifest; ``files``: every file but the weights; ``weights``: the safetensors
    files. Neither is read before it is asked for.
    """

    def __init__(self, place: Place, *, identity: AnyIdentity, options: Mapping[str, Any], **pins: Any) -> None:
        self._place, self._options = place, dict(options)
        self._manifest: FolderManifest | None = None
        self._shard: tuple[str, safe_open] | None = None
        found = place.list()
        check_sealed(found)
        self._reader = SealedReader(place.source(MANIFEST), identity=identity, **pins)
        try:
            self.facts: PublicFacts = self._reader.facts
            names = [name for name in self._reader.places if name != SHARDS]
            if any(not name.startswith(FILE_PREFIX) for name in names):
                raise MalformedError("folder: its manifest is that of something else")
            self.files = tuple(sorted(check_name(name.removeprefix(FILE_PREFIX)) for name in names))
            if SHARDS in self._reader.places:
                raw = self._reader.read(SHARDS)
                self._manifest = FolderManifest.parse(raw.tobytes())
                wipe(raw.data)
                check_listing(found, self._manifest.shards)
            self.weights = tuple(shard.name for shard in self._manifest.shards) if self._manifest else ()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> bytes:
        """One file. Raises UsageError for a name that is not in ``files``."""
        if name not in self.files:
            raise UsageError(f"no file {name[:80]!r} in what this identity can open")
        return self._reader.read(FILE_PREFIX + name).tobytes()

    def copy(self, name: str, sink: Sink) -> None:
        """Write one of ``files`` into ``sink``, a piece at a time."""
        if name not in self.files:
            raise UsageError(f"no file {name[:80]!r} in what this identity can open")
        place = self._reader.place(FILE_PREFIX + name)
        batch = memoryview(bytearray(min(_BATCH, place.entry.size)))
        try:
            for start in range(0, place.entry.size, _BATCH):
                part = batch[: min(_BATCH, place.entry.size - start)]
                self._reader.fill({place.compartment: [Piece(place.start + start, part)]})
                sink.write(part)
        finally:
            wipe(batch)

    def json(self, name: str) -> Any:
        """One file, as JSON. Raises MalformedError."""
        raw = self.read(name)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise MalformedError(f"folder: {name[:80]!r} is not JSON") from None

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        found = self.json("config.json")
        if not isinstance(found, dict):
            raise MalformedError("folder: config.json is no object")
        return found

    @property
    def tokenizer(self) -> dict[str, bytes]:
        """The files of the tokenizer, by name: ``tokenizers.Tokenizer.from_buffer`` takes tokenizer.json."""
        return {name: self.read(name) for name in _TOKENIZER if name in self.files}

    def open_weights(self, name: str) -> safe_open:
        """One of ``weights``, checked against the manifest: close it, or use it as a context manager."""
        source, row, pins = self._bound(name)
        opened = safe_open(source, **pins, **self._options)
        if not opened.facts.epoch == row.epoch == self.facts.epoch:
            opened.close()
            raise RolledBack("origin: a shard is of another epoch than its folder")
        return opened

    def unseal_weights(self, name: str, target: PathLike, progress: Progress | None = None) -> None:
        """Write one of ``weights`` as a plain safetensors file, mode 0600."""
        source, _, pins = self._bound(name)
        unseal_file(source, target, progress=progress, **pins)

    def _bound(self, name: str) -> tuple[Source, Shard, dict[str, Any]]:
        """Where weights stand, and what pins them: a shard swapped, older or a stranger's has another digest."""
        manifest = self._manifest
        if manifest is None or name not in self.weights:
            raise UsageError(f"no weights {name[:80]!r} in what this identity can open")
        index = self.weights.index(name)
        row = manifest.shards[index]
        pins = {
            "identity": ShardKey(manifest.key, manifest.id),
            "signed_by": self.facts.signer,
            "expect": row.digest,
        }
        return self._place.source(shard_object(index)), row, pins

    def shards(self) -> Iterator[dict[str, Any]]:
        """The state dict in parts, one for each shard. Who deletes a part before asking for the next has one in
        memory at a time, also where ``for`` would still hold the last."""
        for name, wanted in self._model():
            with self.open_weights(name) as opened:
                if wanted is not None and set(opened.keys()) != wanted:
                    raise MalformedError("folder: a shard does not hold the tensors that the index names")
                part = opened.get_tensors()
            yield part
            del part

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """The model's tensors one after another, shard by shard: what takes the least memory."""
        for name, wanted in self._model():
            with self.open_weights(name) as opened:
                for key in opened.offset_keys():
                    if wanted is None or key in wanted:
                        yield key, opened.get_tensor(key)

    def state_dict(self) -> dict[str, Any]:
        """Every tensor of the model: those of the index, or of the one safetensors file. Raises UsageError."""
        found: dict[str, Any] = {}
        for part in self.shards():
            found.update(part)
        return found

    def keys(self) -> list[str]:
        """The names of the model's tensors, sorted."""
        return sorted(key for name, wanted in self._model() for key in (wanted or self._opened(name).keys()))

    def get_tensor(self, name: str) -> Any:
        """One tensor. Its shard stays open for the next."""
        for shard, wanted in self._model():
            if wanted is None or name in wanted:
                return self._opened(shard).get_tensor(name)
        raise UsageError(f"no tensor {name[:80]!r} in this folder")

    def _opened(self, name: str) -> safe_open:
        if self._shard is None or self._shard[0] != name:
            self._close_shard()
            self._shard = (name, self.open_weights(name))
        return self._shard[1]

    def _model(self) -> Iterable[tuple[str, set[str] | None]]:
        """The shards of the model, with their tensors where an index says them."""
        if INDEX in self.files:
            parts: dict[str, set[str]] = {}
            for key, name in _weight_map(self.read(INDEX)).items():
                parts.setdefault(name, set()).add(key)
            return [(name, parts[name]) for name in sorted(parts)]
        top = [name for name in self.weights if "/" not in name]
        if "model.safetensors" in top:
            top = ["model.safetensors"]
        if len(top) != 1:
            raise UsageError("no index says which weights are the model: take them with open_weights(name)")
        return [(top[0], None)]

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard[1].close()
            self._shard = None

    def close(self) -> None:
        """Forget the keys and close what is open."""
        self._close_shard()
        if self._manifest is not None:
            self._manifest.key.wipe()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_folder(
    path: PathLike,
    *,
    identity: AnyIdentity,
    signed_by: VerifyingKey | str | None = None,
    expect: bytes | Epoch | None = None,
    framework: str = "np",
    device: str = "cpu",
    threads: int | None = None,
    tags_only: bool = False,
) -> SealedFolder:
    """Open a sealed folder at a path or URL, after its manifest and the list of its files were checked.

    ``identity``, ``signed_by``, ``expect`` (a folder's digest, or an Epoch) and the rest as in ``safe_open``.
    Raises NotSealed (plain, or mixed with plain), Truncated (a shard is missing), Tampered (something stands there
    that the manifest does not name), RolledBack, and what ``safe_open`` raises; faults of a shard when it is read.
    """
    options = {"framework": framework, "device": device, "threads": threads, "tags_only": tags_only}
    pins = {"signed_by": signed_by, "expect": expect}
    return SealedFolder(place_of(path), identity=identity, options=options, **pins)


def unseal_folder(source: PathLike, target: PathLike, *, progress: Progress | None = None, **options: Any) -> None:
    """Write the plain folder to the path ``target``, where nothing stands yet: complete or not at all.

    ``options``: identity, signed_by, expect. Tensors come back equal, headers of safetensors files newly written.
    For owners who take a model home: files have mode 0600, folders 0700.
    """
    if isinstance(target, str) and is_url(target):
        raise UsageError("a plain folder is written to a path of this machine, not to a store")
    done = 0
    with open_folder(source, **options) as folder, _appearing(target, 0o700) as place:
        root = place.path if isinstance(place, LocalFolder) else Path()
        for name in (*folder.files, *folder.weights):
            try:
                (root / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise storage_error(f"cannot write {target}", error) from None
        for name in folder.files:
            sink = FileSink(root / name, mode=0o600)
            try:
                folder.copy(name, sink)
                sink.commit()
            finally:
                sink.abort()
        for name in folder.weights:
            folder.unseal_weights(name, root / name, _shifted(progress, done))
            done += _size(root / name)
