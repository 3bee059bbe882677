"""Sealed datasets: rows of sealed shards, by index or as a shuffled stream, with workers.

    >>> import pathlib, tempfile
    >>> import torch
    >>> from isolate import Identity, SigningKey, sealed
    >>> from isolate.torch import SealedDataLoader, SealedDataset
    >>> owner, identity = SigningKey.generate(), Identity.generate()
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.sealed"
    >>> columns = {"x": torch.arange(6.0).reshape(3, 2), "label": torch.tensor([0, 1, 2])}
    >>> _ = sealed.save_file(columns, path, recipients=[identity.recipient], sign=owner)
    >>> data = SealedDataset(path, identity=identity, signed_by=owner.verifying_key)
    >>> len(data), data[1]
    (3, {'x': tensor([2., 3.]), 'label': tensor(1)})
    >>> [batch["label"].tolist() for batch in SealedDataLoader(data, batch_size=2)]
    [[0, 1], [2]]

Workload mode: the code that trains sees plaintext. A dataset is a sealed file, or a sealed folder whose shards are
bound by its manifest (isolate.sealed.seal_folder). The tensors of a shard are its columns: as many rows in each,
along the first dimension. Only the chunks of the rows that are asked for are read.

torch's DataLoader hands tensors from workers to the trainer in files of shared memory, in plaintext. So in a worker
of that loader these datasets refuse to read; SealedDataLoader takes its place (isolate.torch.handoff).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from isolate.crypto.kem import Identity
from isolate.crypto.signing import VerifyingKey
from isolate.errors import MalformedError, UsageError
from isolate.sealed.directory import Epoch, PublicFacts
from isolate.sealed.folder import SealedFolder, open_folder
from isolate.sealed.folder_manifest import is_folder
from isolate.sealed.keys import CompartmentKeys, FileKey
from isolate.sealed.layout import CHUNK_SIZE
from isolate.sealed.manifest import tensor_size
from isolate.sealed.recipients import AnyIdentity, KeyWrapper, Passphrase, Unlocker
from isolate.sealed.safetensors import safe_open
from isolate.sealed.stores import PathLike
from isolate.torch import handoff

BLOCK = CHUNK_SIZE  # bytes of a column that are read at once: a chunk is decrypted as a whole
CACHE = 64 << 20  # bytes of plaintext that are kept for the next rows

Sample = dict[str, Any]


@frozen
class Column:
    """What all shards have in common: dtype as safetensors calls it, shape of one row, rows of one block."""

    dtype: str
    shape: tuple[int, ...]
    block: int

    @classmethod
    def of(cls, dtype: str, shape: Sequence[int]) -> Column:
        if not shape:
            raise MalformedError("dataset: a column has no rows")
        return cls(dtype, tuple(shape[1:]), max(1, BLOCK // max(1, tensor_size(dtype, shape[1:]))))


class _Shards:
    """The shards as this process has them open."""

    def __init__(self, path: PathLike, columns: Sequence[str] | None, options: Mapping[str, Any]) -> None:
        self._folder: SealedFolder | None = None
        self._files: list[safe_open] = []
        self.columns: dict[str, Column] = {}
        self.ends: list[int] = []
        try:
            if is_folder(path):
                self._folder = open_folder(path, framework="pt", **options)
                for name in self._folder.weights:
                    self._add(self._folder.open_weights(name), columns)
            else:
                self._add(safe_open(path, "pt", **options), columns)
        except BaseException:
            self.close()
            raise
        if not self.ends:
            raise MalformedError("dataset: there are no shards in what this identity can open")

    def _add(self, file: safe_open, wanted: Sequence[str] | None) -> None:
        self._files.append(file)
        names = file.offset_keys() if wanted is None else list(wanted)
        parts = {name: file.get_slice(name) for name in names}
        found = {name: Column.of(part.get_dtype(), part.get_shape()) for name, part in parts.items()}
        rows = {part.get_shape()[0] for part in parts.values()}
        if len(rows) != 1 or found != (self.columns or found):
            raise MalformedError("dataset: columns differ in their rows, or shards in their columns")
        self.columns = found
        self.ends.append((self.ends[-1] if self.ends else 0) + rows.pop())

    def read(self, shard: int, column: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of one column, in new memory."""
        found: torch.Tensor = self._files[shard].get_slice(column)[start:stop]
        return found

    def close(self) -> None:
        for file in self._files:
            file.close()
        if self._folder is not None:
            self._folder.close()


class _Asking:
    """Asks for the keys of a file once: what was released to a process, its forked workers have in their memory.

    So a worker needs no service, and does not attest: the platform's socket and the locks are the parent's.
    """

    def __init__(self, inner: Unlocker) -> None:
        self._inner = inner
        self._pid, self._released = os.getpid(), {}  # type: int, dict[bytes, CompartmentKeys]

    def unlock(self, facts: PublicFacts) -> FileKey | CompartmentKeys:
        known = self._released.get(facts.digest)
        if known is not None and os.getpid() != self._pid:
            return known
        found = self._inner.unlock(facts)
        if isinstance(found, CompartmentKeys):
            self._released[facts.digest] = found
        return found

    def forget(self) -> None:
        self._released.clear()


class _Reading:
    """What both kinds of dataset share: opening in each process, blocks in a cache, and who may ask."""

    def __init__(
        self,
        path: PathLike,
        *,
        identity: AnyIdentity | None = None,
        identity_factory: Callable[[], AnyIdentity] | None = None,
        signed_by: VerifyingKey | str | None = None,
        expect: bytes | Epoch | None = None,
        columns: Sequence[str] | None = None,
        transform: Callable[[Sample], Any] | None = None,
        cache: int = CACHE,
    ) -> None:
        if (identity is None) == (identity_factory is None):
            raise UsageError("give identity=, or identity_factory= where workers are spawned")
        if isinstance(identity, Unlocker) and not isinstance(identity, Identity | Passphrase | KeyWrapper):
            identity = _Asking(identity)
        self._path, self._identity, self._factory = os.fspath(path), identity, identity_factory
        self._signed_by, self._expect = None if signed_by is None else str(signed_by), expect
        self._columns = None if columns is None else list(columns)
        self._transform, self._limit = transform, cache
        self._forget()

    def _forget(self) -> None:
        self._pid, self._shards = -1, None  # type: tuple[int, _Shards | None]
        self._blocks: OrderedDict[tuple[int, str, int], torch.Tensor] = OrderedDict()
        self._kept = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is spawned: where to find it and whom to ask, no key and no plaintext."""
        if self._factory is None:
            raise UsageError(
                "a dataset with identity= is not pickled: keys do not travel",
                hint="let workers fork, or give identity_factory=, a function that gets the identity in the worker",
            )
        left = ("_shards", "_blocks", "_lock", "_pid", "_kept", "_identity")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._identity = None
        self._forget()

    def _open(self) -> _Shards:
        """The shards, opened by this process: a forked one opens its own."""
        if get_worker_info() is not None and not handoff.active():
            raise UsageError(
                "torch's DataLoader passes what its workers read through shared memory, in plaintext",
                hint="take isolate.torch.SealedDataLoader in its place, or num_workers=0",
            )
        if self._shards is None or self._pid != os.getpid():
            self._forget()
            identity = self._identity if self._factory is None else self._factory()
            options = {"identity": identity, "signed_by": self._signed_by, "expect": self._expect, "threads": 1}
            self._shards, self._pid = _Shards(self._path, self._columns, options), os.getpid()
        return self._shards

    def _before_workers(self) -> None:
        """Open it here, so that workers which are forked have the keys: SealedDataLoader calls this."""
        if self._factory is None:
            self._open()

    def _row(self, shards: _Shards, shard: int, row: int) -> Sample:
        """One sample: {column: tensor}, in memory of its own."""
        found = {}
        for name, column in shards.columns.items():
            block = self._block(shards, shard, name, row // column.block)
            found[name] = block[row % column.block].clone()
        return found

    def _block(self, shards: _Shards, shard: int, name: str, index: int) -> torch.Tensor:
        key = (shard, name, index)
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
            size = shards.columns[name].block
            block = shards.read(shard, name, index * size, (index + 1) * size)
            self._blocks[key] = block
            self._kept += block.nbytes
            while self._kept > self._limit and len(self._blocks) > len(shards.columns):
                self._kept -= self._blocks.popitem(last=False)[1].nbytes
            return block

    def _finish(self, sample: Sample) -> Any:
        return sample if self._transform is None else self._transform(sample)

    def close(self) -> None:
        """Forget the keys and what is kept in plaintext. Reading again asks for the keys again."""
        if self._shards is not None:
            self._shards.close()
        if isinstance(self._identity, _Asking):
            self._identity.forget()
        for block in self._blocks.values():
            block.zero_()
        self._forget()


class SealedDataset(_Reading, Dataset[Any]):
    """Rows by index. ``path``: a sealed file or folder, or the URL of one.

    ``identity`` (an Identity, a Workload ...), or ``identity_factory``, which gets it in each process: with workers
    that are spawned, because no key is pickled. ``signed_by``, ``expect`` as in ``safe_open``. ``columns``: which,
    or all. ``transform``: from {column: tensor} to what is answered. ``cache``: bytes of plaintext kept. Raises
    what ``safe_open`` and ``open_folder`` raise, and MalformedError for shards that do not go together.
    """

    def __len__(self) -> int:
        return self._open().ends[-1]

    def __getitem__(self, index: int) -> Any:
        shards = self._open()
        total = shards.ends[-1]
        if not -total <= index < total:
            # The protocol of sequences, by which iteration over a dataset ends.
            raise IndexError(index)
        return self._finish(self._row(shards, *_locate(shards.ends, int(index) % total)))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several, as DataLoader asks for a batch: read in the order of the file, answered in the order asked."""
        order = sorted(range(len(indices)), key=lambda place: indices[place])
        found: dict[int, Any] = {place: self[indices[place]] for place in order}
        return [found[place] for place in range(len(indices))]


def _locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The shard of a row, and the row's number there."""
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if ends[middle] <= index else (low, middle)
    return low, index - (ends[low - 1] if low else 0)


class SealedIterableDataset(_Reading, IterableDataset[Any]):
    """Rows as a stream, each once: divided among the workers, and among ``world_size`` ranks.

    ``shuffle``: blocks in an order drawn from ``seed`` and the epoch (``set_epoch``), and rows among ``mix`` blocks
    at a time: that reads each chunk about once, where an order drawn over all rows would read one for each row.
    The other arguments as in SealedDataset.
    """

    def __init__(
        self, path: PathLike, *, shuffle: bool = False, seed: int = 0, mix: int = 8, rank: int = 0,
        world_size: int = 1, **options: Any,
    ) -> None:  # fmt: skip
        if not 0 <= rank < world_size or mix < 1:
            raise UsageError("a rank is less than the world size, and mix is at least 1")
        _Reading.__init__(self, path, **options)
        self._shuffle, self._seed, self._mix, self._epoch = shuffle, seed, mix, 0
        self._rank, self._world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Another order for the next iteration; workers that persist go on with the epoch they began with."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        shards, worker = self._open(), get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        generator = torch.Generator()
        generator.manual_seed(self._seed * 1_000_003 + self._epoch)
        spans = self._spans(shards)
        if self._shuffle:
            spans = [spans[place] for place in torch.randperm(len(spans), generator=generator).tolist()]
        spans = spans[self._rank * count + number :: self._world_size * count]
        for start in range(0, len(spans), self._mix if self._shuffle else 1):
            group = spans[start : start + (self._mix if self._shuffle else 1)]
            rows = [(shard, row) for shard, first, last in group for row in range(first, last)]
            if self._shuffle:
                rows = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
            for shard, row in rows:
                yield self._finish(self._row(shards, shard, row))

    def _spans(self, shards: _Shards) -> list[tuple[int, int, int]]:
        """(shard, first row, row behind the last) for each block of the widest column."""
        size, begin, spans = min(column.block for column in shards.columns.values()), 0, []
        for shard, end in enumerate(shards.ends):
            rows = end - begin
            spans += [(shard, first, min(first + size, rows)) for first in range(0, rows, size)]
            begin = end
        return spans
