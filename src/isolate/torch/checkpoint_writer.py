"""Saving a sealed checkpoint: what isolate.torch.checkpoint shows as SealedStorageWriter.

    >>> from isolate import SigningKey
    >>> from isolate.torch.checkpoint_writer import SealedStorageWriter
    >>> SealedStorageWriter("run/step-1", sign=SigningKey.generate())
    Traceback (most recent call last):
    ...
    isolate.errors.UsageError: recipients= says who can open the checkpoint

docs/spec/sealed-checkpoint.md, section 5. The steps of a save, as torch.distributed.checkpoint takes them:

1. every rank looks at its plan and at the folder; what has no sealed form is refused before a byte is written
2. the coordinator makes an identity for this checkpoint, and offers its public half with the plans
3. every rank checks the offer and seals what is its own into one file, in the subfolder of this save
4. the coordinator opens each file, checks its signer, place and tensors, and seals the manifest
5. with a workload: the manifest is written under a name of its own, and registered with the service
6. the manifest takes its place: now, and not before, this checkpoint is the one that is there
7. what the save before it left is deleted
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from isolate.crypto.aead import Suite
from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.secret import Secret, wipe
from isolate.crypto.signing import SigningKey
from isolate.enclave.workload import Workload
from isolate.errors import IsolateError, StorageError, Tampered, UsageError
from isolate.sealed.folder_manifest import Place
from isolate.sealed.manifest import Entry
from isolate.sealed.reader import SealedReader, public_facts
from isolate.sealed.recipients import AnyRecipient
from isolate.sealed.stores import MemorySink, MemorySource, PathLike
from isolate.sealed.writer import SealedWriter
from isolate.torch.checkpoint_manifest import (
    ID_SIZE,
    MANIFEST,
    TENSOR,
    CheckpointManifest,
    Chunk,
    ObjectRow,
    RankFile,
    TensorRow,
    check_folder,
    file_name,
    leftovers,
    object_key,
    pending,
    pending_name,
)
from isolate.torch.checkpoint_parties import Offer, WorkloadParty, party_of
from isolate.torch.checkpoint_place import CheckpointPlace
from isolate.torch.checkpoint_tensors import check_tensor, dtype_name, sealed_shape
from isolate.torch.checkpoint_values import encode_value

_ONE_BY_ONE = "nothing would bind the files of the ranks to one another"


@frozen
class _Assignment:
    """What a rank gets with its plan."""

    rank: int
    offer: Offer


@frozen
class _Report:
    """What a rank sends back: public, no key."""

    id: bytes
    rank: int
    digest: bytes
    proof: bytes = field(repr=False)


class _Staged(dict[str, Any]):
    """A state dict that was copied for ``async_save``. Another process would get it through a file of shared memory
    in plaintext, so it does not travel."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError(
            "a sealed checkpoint is not saved by another process: tensors would pass through shared memory",
            hint="take async_checkpointer_type=AsyncCheckpointerType.THREAD",
        )


class SealedStorageWriter(StorageWriter, BlockingAsyncStager):
    """Saves a sealed checkpoint into ``path``, a folder or the URL of one, with ``dcp.save`` or ``dcp.async_save``.

    ``sign``: the owner's key, the same on every rank, or this rank's Workload. ``recipients``: who can open it; for
    a Workload the service's, where None. ``model_id``, ``epoch``, ``previous``, ``suite``, ``threads`` as in
    SealedWriter: every rank gives the same model id and epoch. ``overwrite``: let a checkpoint that stands there
    be replaced; up to the last step it stays as it was. ``digest``, on the coordinator: of the manifest (32
    bytes), for ``expect=``. Raises UsageError, StorageError, UnauthenticatedOrigin, NotSealed, Tampered, and what
    a service refuses.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        sign: SigningKey | Workload,
        recipients: Sequence[AnyRecipient] | None = None,
        model_id: str = "",
        epoch: int = 0,
        previous: bytes | None = None,
        overwrite: bool = False,
        suite: Suite | None = None,
        threads: int | None = None,
    ) -> None:
        BlockingAsyncStager.__init__(self)
        self._party = party_of(sign)
        if recipients is None and not isinstance(self._party, WorkloadParty):
            raise UsageError("recipients= says who can open the checkpoint")
        if isinstance(self._party, WorkloadParty) and not model_id:
            raise UsageError("model_id= says as which asset the service registers the checkpoint")
        self._place, self._recipients = CheckpointPlace.at(path), recipients
        self._facts: dict[str, Any] = {"model_id": model_id, "epoch": epoch}
        self._options: dict[str, Any] = {"suite": suite, "threads": threads}
        self._previous, self._overwrite = previous, overwrite
        self._save: tuple[bytes, Secret] | None = None
        self.digest: bytes | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins, maybe somewhere else."""
        if checkpoint_id:
            self._place = CheckpointPlace.at(checkpoint_id)
        self._save = self.digest = None

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return _Staged(BlockingAsyncStager.stage(self, state_dict))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise UsageError(f"a sealed checkpoint needs use_collectives=True: {_ONE_BY_ONE}")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Step 1."""
        _check_plan(plan)
        for item in plan.items:
            if item.tensor_data is not None:
                dtype_name(item.tensor_data.properties.dtype)
                if item.tensor_data.properties.layout != torch.strided:
                    raise UsageError("a sealed checkpoint holds dense tensors only", hint="use to_dense()")
        if check_folder(self._place.list(create=True)) and not self._overwrite:
            raise UsageError(
                "a checkpoint stands there already",
                hint="take a folder for each step, or overwrite=True: the old one stays until the new is whole",
            )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Step 2."""
        for plan in plans:
            _check_plan(plan)
        checkpoint, seed = secrets.token_bytes(ID_SIZE), Secret.generate(32)
        offer = Offer.make(self._party, checkpoint, Identity(seed).recipient, **self._facts)
        self._save = checkpoint, seed
        return [dataclasses.replace(plan, storage_data=_Assignment(i, offer)) for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Step 3."""
        assigned = plan.storage_data
        if not isinstance(assigned, _Assignment):
            raise UsageError("a planner has replaced what the storage writer put into the plan")
        assigned.offer.verify(self._party, **self._facts)
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan.items, planner, assigned) if plan.items else [])
        return done

    def _write(self, items: Sequence[WriteItem], planner: SavePlanner, assigned: _Assignment) -> list[WriteResult]:
        id, rank = assigned.offer.id, assigned.rank
        # Every value is encoded before anything is written: what has no form is refused at once.
        values = {item.index.fqn: _value(planner, item) for item in items if item.type == WriteItemType.BYTE_IO}
        place = self._place.save(id, create=True)
        if file_name(rank) in place.list():
            raise UsageError("this plan was carried out before: each save takes a new one")
        sizes = [len(values[item.index.fqn]) if item.tensor_data is None else 0 for item in items]
        writer = SealedWriter(
            place.sink(file_name(rank)), recipients=[Recipient(assigned.offer.recipient)], sign=self._party.sign,
            metadata=_metadata(id, rank), **self._facts, **self._options,
        )  # fmt: skip
        with writer:
            for name, value in values.items():
                writer.add(object_key(name), np.frombuffer(value, np.uint8))
            for index, item in enumerate(items):
                if item.tensor_data is not None:
                    tensor = check_tensor(planner.resolve_data(item))
                    sizes[index] = tensor.nbytes
                    writer.add(_chunk(item, rank).key(item.index.fqn), tensor, steady=True)
        report = _Report(id, rank, writer.close(), self._party.proof())
        return [WriteResult(item.index, size, report) for item, size in zip(items, sizes, strict=True)]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Steps 4 to 7."""
        if self._save is None:
            raise UsageError("only the coordinator of a save finishes it")
        (id, seed), self._save = self._save, None
        metadata.storage_meta = self.storage_meta()
        with seed:
            manifest = self._bind(id, seed, metadata, [rank[0].storage_data for rank in results if rank])
            sealed = self._seal(manifest)
        registered = self._register(id, sealed)
        self._place.write(MANIFEST, sealed)
        # Nothing needs this any more, and the next save removes what stays.
        with contextlib.suppress(IsolateError):
            found = self._place.list()
            for name in [*registered, *pending(found), *leftovers(found, keep=id.hex())]:
                self._place.remove(name)

    def _bind(self, id: bytes, seed: Secret, metadata: Metadata, reports: Sequence[Any]) -> CheckpointManifest:
        """Step 4: the manifest, from what is in the files themselves and not from what was said about them."""
        place, identity = self._place.save(id, create=True), Identity(seed)
        files: list[RankFile] = []
        entries: dict[str, tuple[int, Entry]] = {}
        for report in reports:
            if not isinstance(report, _Report) or report.id != id or report.rank in [file.rank for file in files]:
                raise UsageError("the ranks carried out another plan than this one")
            source = _stored(place, file_name(report.rank))
            with SealedReader(source, identity=identity, expect=report.digest) as reader:
                self._party.check(reader.facts.signer, report.proof)
                if dict(reader.metadata) != _metadata(id, report.rank):
                    raise Tampered("checkpoint: a rank's file is of another place or save")
                files.append(RankFile(report.rank, report.digest, source.size))
                for name, entry in reader.entries.items():
                    if name in entries:
                        raise UsageError("two ranks have written the same part of the checkpoint")
                    entries[name] = report.rank, entry
        files.sort(key=lambda file: file.rank)
        tensors, objects = _rows(metadata, entries)
        return CheckpointManifest(id, seed, tuple(files), tensors, objects)

    def _seal(self, manifest: CheckpointManifest) -> bytes:
        party, sink, raw = self._party, MemorySink(), bytearray(manifest.encode())
        # What is written now must be readable later.
        CheckpointManifest.parse(raw).key.wipe()
        recipients = self._recipients
        if recipients is None and isinstance(party, WorkloadParty):
            recipients = party.workload.recipients()
        writer = SealedWriter(
            sink, recipients=recipients or (), sign=party.sign, previous=self._previous, **self._facts,
            **self._options,
        )  # fmt: skip
        try:
            with writer:
                writer.add(TENSOR, np.frombuffer(raw, np.uint8))
            self.digest = writer.close()
        finally:
            wipe(raw)
        return sink.data

    def _register(self, id: bytes, sealed: bytes) -> list[str]:
        """Step 5: from when the service has it, this manifest is the one in force, and it must not get lost."""
        self._place.sync()
        if not isinstance(self._party, WorkloadParty):
            return []
        self._place.write(pending_name(id), sealed)
        self._party.workload.register(self._facts["model_id"], public_facts(MemorySource(sealed)))
        return [pending_name(id)]

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    @property
    def checkpoint_id(self) -> str:
        """Where the checkpoint is written."""
        return self._place.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, str | os.PathLike)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("a SealedStorageWriter holds keys: it is not copied to another process")


def _check_plan(plan: SavePlan) -> None:
    if not plan.usable:
        raise UsageError("a sealed checkpoint takes no cached plans: leave enable_plan_caching off")


def _metadata(id: bytes, rank: int) -> dict[str, str]:
    """Encrypted in each rank's file: which save it is of, and which file of it."""
    return {"checkpoint": id.hex(), "rank": str(rank)}


def _value(planner: SavePlanner, item: WriteItem) -> bytes:
    """The value itself, before a planner makes a pickle of it."""
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise UsageError(
            "this planner does not say what a value is before it pickles it",
            hint="derive it from DefaultSavePlanner, or keep only tensors in the state dict",
        )
    try:
        return encode_value(lookup(item.index))
    except UsageError as error:
        where = f"{item.index.fqn[:200]}: {error.message}"
        raise UsageError(where, hint=error.hint) from None


def _chunk(item: WriteItem, rank: int) -> Chunk:
    data = item.tensor_data
    if data is None or item.index.offset is None or data.chunk is None:
        raise UsageError("a planner has made a plan without the place of a tensor")
    return Chunk(rank, tuple(data.chunk.offsets), tuple(data.chunk.sizes))


def _stored(place: Place, name: str) -> Any:
    try:
        return place.source(name)
    except StorageError as error:
        raise StorageError(
            error.message, hint="every rank writes into one folder that the coordinator sees too"
        ) from None


def _rows(
    metadata: Metadata, entries: Mapping[str, tuple[int, Entry]]
) -> tuple[tuple[TensorRow, ...], tuple[ObjectRow, ...]]:
    """What torch says the checkpoint holds, each part found in one file, and nothing beside it."""
    paths: Any = metadata.planner_data
    if paths is not None and not isinstance(paths, dict):
        raise UsageError("a planner keeps data of its own in the checkpoint", hint="use DefaultSavePlanner's")
    left = dict(entries)

    def take(key: str, expected: tuple[str, tuple[int, ...]] | None) -> int:
        rank, entry = left.pop(key, (-1, None))
        if entry is None or (expected is not None and (entry.dtype, entry.shape) != expected):
            raise UsageError("a rank has not written what its plan says")
        return rank

    tensors, objects = [], []
    for name, found in metadata.state_dict_metadata.items():
        path = None if paths is None else tuple(paths[name]) if name in paths else None
        if not isinstance(found, TensorStorageMetadata):
            objects.append(ObjectRow(name, path, take(object_key(name), None)))
            continue
        dtype, chunks = dtype_name(found.properties.dtype), []
        for box in found.chunks:
            chunk = Chunk(-1, tuple(box.offsets), tuple(box.sizes))
            rank = take(chunk.key(name), (dtype, sealed_shape(dtype, chunk.sizes)))
            chunks.append(evolve(chunk, file=rank))
        row = TensorRow(name, dtype, tuple(found.size), path, tuple(chunks))
        if not row.complete:
            raise UsageError(
                "the ranks together do not hold the whole of a tensor", hint="save on all of its ranks"
            )
        tensors.append(row)
    if left:
        raise UsageError("a rank has written what no plan names")
    return tuple(tensors), tuple(objects)
