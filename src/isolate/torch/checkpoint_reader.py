"""Loading a sealed checkpoint: what isolate.torch.checkpoint shows as SealedStorageReader.

    >>> import tempfile
    >>> from isolate import Identity, SigningKey
    >>> from isolate.torch.checkpoint_reader import SealedStorageReader
    >>> pins = {"identity": Identity.generate(), "signed_by": SigningKey.generate().verifying_key}
    >>> SealedStorageReader(tempfile.mkdtemp(), **pins).read_metadata().state_dict_metadata
    Traceback (most recent call last):
    ...
    isolate.errors.NotSealed: this is no sealed checkpoint (save it with SealedStorageWriter into its own folder)

docs/spec/sealed-checkpoint.md, section 6. The steps of a load, as torch.distributed.checkpoint takes them; none
begins before the one above it has succeeded:

1. the folder holds a sealed checkpoint and nothing plain
2. the manifest opens as a sealed file, with ``signed_by=``, ``expect=`` or a release of the service
3. its record parses, and the subfolder holds exactly the files that it names
4. every rank has opened the same manifest
5. a rank's file that is needed opens with the checkpoint's identity, has the digest of its row, and says that it is
   of this save and this rank
6. each tensor and value in it is what the manifest says, and its chunks authenticate; else its memory is wiped
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from isolate.crypto.kem import Identity
from isolate.crypto.secret import wipe
from isolate.crypto.signing import VerifyingKey
from isolate.enclave.workload import Workload
from isolate.errors import IsolateError, MalformedError, RefusedError, RolledBack, Tampered, UsageError
from isolate.sealed.directory import Epoch, PublicFacts
from isolate.sealed.manifest import Entry
from isolate.sealed.reader import Piece, SealedReader
from isolate.sealed.recipients import AnyIdentity
from isolate.sealed.stores import PathLike
from isolate.sealed.writer import DEFAULT_COMPARTMENT
from isolate.torch.checkpoint_manifest import (
    MANIFEST,
    TENSOR,
    CheckpointManifest,
    Chunk,
    RankFile,
    TensorRow,
    check_files,
    file_name,
    need_checkpoint,
    object_key,
    pending,
)
from isolate.torch.checkpoint_place import CheckpointPlace
from isolate.torch.checkpoint_tensors import memory_of, read_box, sealed_shape, span, torch_dtype
from isolate.torch.checkpoint_values import decode_value

MAX_PENDING = 16  # manifests of interrupted saves that a service is asked about


class _Refused(Metadata):
    """What ``read_metadata`` answers for a checkpoint that is refused: whoever looks into it gets the error.

    torch takes an exception here for a checkpoint of another layout, tries on, and loses its type.
    """

    def __init__(self, error: IsolateError) -> None:
        self.error = error

    @property
    def state_dict_metadata(self) -> NoReturn:
        raise self.error

    def __repr__(self) -> str:
        return f"refused: {self.error}"


class SealedStorageReader(StorageReader):
    """Loads a sealed checkpoint from ``path``, a folder or the URL of one, with ``dcp.load``.

    ``identity``: who opens it, an Identity or this rank's Workload. ``signed_by``, ``expect`` (the manifest's
    digest, or an Epoch) and ``threads`` as in SealedReader. ``facts``, once it is open: what is public of the
    manifest. Any world size loads it, each rank reading only the chunks that it needs. Raises NotSealed, Truncated,
    Tampered, RolledBack, UnauthenticatedOrigin, NoRecipient, MalformedError, StorageError, UsageError.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        identity: AnyIdentity | Workload,
        signed_by: VerifyingKey | str | None = None,
        expect: bytes | Epoch | None = None,
        threads: int | None = None,
    ) -> None:
        self._place, self._identity, self._threads = CheckpointPlace.at(path), identity, threads
        self._pins: dict[str, Any] = {"identity": identity, "signed_by": signed_by, "expect": expect}
        self._manifest: CheckpointManifest | None = None
        self._chunks: dict[tuple[str, tuple[int, ...]], tuple[TensorRow, Chunk]] = {}
        self._objects: dict[str, int] = {}
        self.facts: PublicFacts | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins, maybe from somewhere else."""
        self.close()
        if checkpoint_id:
            self._place = CheckpointPlace.at(checkpoint_id)

    def close(self) -> None:
        """Forget the checkpoint's key."""
        if self._manifest is not None:
            self._manifest.key.wipe()
        self._manifest = self.facts = None
        self._chunks, self._objects = {}, {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Steps 1 to 3. What is refused raises when the answer is looked into, as torch does next."""
        try:
            return self._open()
        except IsolateError as error:
            return _Refused(error)

    def _open(self) -> Metadata:
        self.close()
        found = self._place.list()
        need_checkpoint(found)
        facts, manifest = self._newest(pending(found)[:MAX_PENDING])
        check_files(self._place.save(manifest.id).list() if manifest.files else {}, manifest)
        self.facts, self._manifest = facts, manifest
        self._chunks = {(row.name, chunk.offsets): (row, chunk) for row in manifest.tensors for chunk in row.chunks}
        self._objects = {row.name: row.file for row in manifest.objects}
        return _metadata(manifest)

    def _newest(self, waiting: Sequence[str]) -> tuple[PublicFacts, CheckpointManifest]:
        """The manifest in its place; or, for a workload, one that was registered when its save was interrupted.

        The service knows which one is in force, and refuses every other.
        """
        for name in waiting if isinstance(self._identity, Workload) else ():
            with contextlib.suppress(RefusedError):
                return self._read_manifest(name)
        return self._read_manifest(MANIFEST)

    def _read_manifest(self, name: str) -> tuple[PublicFacts, CheckpointManifest]:
        """Steps 2 and 3."""
        with SealedReader(self._place.source(name), **self._pins) as reader:
            if list(reader.places) != [TENSOR]:
                raise MalformedError("checkpoint: its manifest is that of something else")
            raw = reader.read(TENSOR)
            try:
                return reader.facts, CheckpointManifest.parse(raw.data)
            finally:
                wipe(raw.data)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if isinstance(metadata, _Refused):
            raise metadata.error
        self._opened()

    def _opened(self) -> tuple[PublicFacts, CheckpointManifest]:
        if self._manifest is None or self.facts is None:
            raise UsageError("this checkpoint is not open: dcp.load opens it")
        return self.facts, self._manifest

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return dataclasses.replace(plan, storage_data=self._opened()[0].digest)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Step 4: who keeps the files could show each rank another checkpoint, each of them genuine."""
        digest = self._opened()[0].digest
        if any(plan.storage_data != digest for plan in plans):
            raise RolledBack("checkpoint: the ranks were shown different ones")
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Steps 5 and 6."""
        _, manifest = self._opened()
        tensors: dict[int, list[tuple[ReadItem, TensorRow, Chunk]]] = {}
        objects: dict[int, list[ReadItem]] = {}
        for item in plan.items:
            name, offset = item.storage_index.fqn, tuple(item.storage_index.offset or ())
            if item.type == LoadItemType.BYTE_IO and name in self._objects:
                objects.setdefault(self._objects[name], []).append(item)
            elif item.type == LoadItemType.TENSOR and (name, offset) in self._chunks:
                row, chunk = self._chunks[name, offset]
                tensors.setdefault(chunk.file, []).append((item, row, chunk))
            else:
                raise UsageError(f"the plan asks for {name[:80]!r}, which is not in this checkpoint in that form")
        for file in manifest.files:
            if file.rank in tensors or file.rank in objects:
                with self._file(file) as reader:
                    for item in objects.get(file.rank, ()):
                        _deliver(planner, item, _read_object(reader, item.storage_index.fqn))
                    _read_tensors(reader, tensors.get(file.rank, ()), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _file(self, file: RankFile) -> SealedReader:
        """Step 5."""
        facts, manifest = self._opened()
        source = self._place.save(manifest.id).source(file_name(file.rank))
        reader = SealedReader(source, identity=Identity(manifest.key), expect=file.digest, threads=self._threads)
        named = {"checkpoint": manifest.id.hex(), "rank": str(file.rank)}
        same = (reader.facts.epoch, reader.facts.model_id) == (facts.epoch, facts.model_id)
        if not same or dict(reader.metadata) != named:
            reader.close()
            raise Tampered("checkpoint: a rank's file is of another place or save")
        return reader

    @property
    def checkpoint_id(self) -> str:
        """Where the checkpoint is read from."""
        return self._place.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, str | os.PathLike)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("a SealedStorageReader holds keys: it is not copied to another process")


def _metadata(manifest: CheckpointManifest) -> Metadata:
    """What torch plans with."""
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for row in manifest.tensors:
        boxes = [ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes)) for one in row.chunks]
        properties = TensorProperties(dtype=torch_dtype(row.dtype))
        found[row.name] = TensorStorageMetadata(properties, torch.Size(row.shape), boxes)
    found |= {row.name: BytesStorageMetadata() for row in manifest.objects}
    named = [(row.name, row.path) for row in manifest.tensors] + [(row.name, row.path) for row in manifest.objects]
    paths = {name: path for name, path in named if path is not None}
    return Metadata(found, planner_data=paths or None)


def _read_tensors(
    reader: SealedReader, wanted: Sequence[tuple[ReadItem, TensorRow, Chunk]], planner: LoadPlanner
) -> None:
    """Step 6. What stands in one piece here and there is decrypted where it belongs; the rest by way of a copy."""
    pieces: list[Piece] = []
    direct: list[tuple[ReadItem, torch.Tensor]] = []
    copied: list[tuple[ReadItem, torch.Tensor, str]] = []
    for item, row, chunk in wanted:
        key = chunk.key(row.name)
        target = planner.resolve_tensor(item).detach()
        if tuple(target.shape) != tuple(item.lengths):
            raise UsageError(f"{row.name[:80]!r} has another shape than its plan says")
        place = reader.places.get(key)
        if place is None or place.entry != Entry(key, row.dtype, sealed_shape(row.dtype, chunk.sizes)):
            raise MalformedError("checkpoint: a rank's file does not hold what the manifest says")
        start = span(chunk.sizes, item.storage_offsets, item.lengths)
        memory = memory_of(target) if target.dtype == torch_dtype(row.dtype) and start is not None else None
        if memory is None or start is None:
            copied.append((item, target, key))
        else:
            pieces.append(Piece(place.start + start * target.element_size(), memory))
            direct.append((item, target))
    reader.fill({DEFAULT_COMPARTMENT: pieces} if pieces else {})
    for item, target in direct:
        planner.commit_tensor(item, target)
    for item, target, key in copied:
        target.copy_(read_box(reader, reader.place(key), item.storage_offsets, item.lengths))
        planner.commit_tensor(item, target)


def _read_object(reader: SealedReader, name: str) -> Any:
    place = reader.places.get(object_key(name))
    if place is None or place.entry.dtype != "U8" or len(place.entry.shape) != 1:
        raise MalformedError("checkpoint: a rank's file does not hold what the manifest says")
    return decode_value(reader.read(object_key(name)).data)


def _deliver(planner: LoadPlanner, item: ReadItem, value: Any) -> None:
    """Put a value where the planner would have put it, had it unpickled it."""
    name = item.dest_index.fqn
    own = getattr(planner, "load_object", None)
    if own is not None:
        own(item, value)
    elif isinstance(planner, DefaultLoadPlanner) and type(planner).load_bytes is DefaultLoadPlanner.load_bytes:
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[name], value)
        else:
            planner.state_dict[name] = value
    else:
        raise UsageError(
            "this planner takes pickles only", hint="give it load_object(read_item, value), which gets the value"
        )
