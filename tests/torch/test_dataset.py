"""Sealed datasets: the rows that were sealed, in any order, with workers, and no plaintext on the way."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import Identity, SigningKey, sealed
from isolate.crypto.secret import Secret
from isolate.errors import (
    MalformedError,
    NoRecipient,
    ReleaseRefused,
    RolledBack,
    Tampered,
    Truncated,
    UnauthenticatedOrigin,
    UsageError,
)

torch = pytest.importorskip("torch", reason="torch is an extra: pip install 'isolate-confidential[torch]'")

from torch.utils.data import DataLoader, Subset  # noqa: E402

from isolate.torch import handoff  # noqa: E402
from isolate.torch.dataset import SealedDataset, SealedIterableDataset  # noqa: E402
from isolate.torch.handoff import SealedDataLoader  # noqa: E402

ROWS, CANARY = 60, b"canary in the training data, 40 bytes..."


def columns(first: int = 0, rows: int = ROWS) -> dict[str, Any]:
    """Each row of x is the canary and then its number; the labels are the numbers."""
    x = torch.frombuffer(bytearray(CANARY * rows), dtype=torch.uint8).reshape(rows, len(CANARY)).clone()
    labels = torch.arange(first, first + rows)
    x[:, -1] = labels.to(torch.uint8)
    return {"x": x, "label": labels}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker in which something was raised keeps torch waiting for five seconds at its end: here for less."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    yield
    gc.collect()


@pytest.fixture
def path(tmp_path: Path, owner: SigningKey, identity: Identity) -> Path:
    found = tmp_path / "train.sealed"
    sealed.save_file(columns(), found, recipients=[identity.recipient], sign=owner, epoch=3)
    return found


@pytest.fixture
def pins(owner: SigningKey, identity: Identity) -> dict[str, Any]:
    return {"identity": identity, "signed_by": owner.verifying_key}


@pytest.fixture
def folder(tmp_path: Path, owner: SigningKey, identity: Identity) -> Path:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, rows in enumerate((20, 30, 10)):
        first = sum((20, 30, 10)[:number])
        safetensors.save_file(columns(first, rows), plain / f"shard-{number}.safetensors")
    sealed.seal_folder(plain, tmp_path / "train", recipients=[identity.recipient], sign=owner)
    return tmp_path / "train"


def labels(batches: Any) -> list[int]:
    return [int(label) for batch in batches for label in batch["label"]]


def check(batch: dict[str, Any]) -> None:
    assert batch["x"][:, -1].tolist() == batch["label"].tolist()
    assert bytes(batch["x"][0, :-1].numpy()) == CANARY[:-1]


def test_rows_by_index(path: Path, folder: Path, pins: dict[str, Any]) -> None:
    for where in (path, folder):
        data = SealedDataset(where, **pins)
        assert len(data) == ROWS and data[-1]["label"] == ROWS - 1
        for index in (0, 19, 20, 49, 50, 59):
            sample = data[index]
            assert sample["label"] == index == sample["x"][-1]
        assert [int(sample["label"]) for sample in data.__getitems__([50, 3, 3, 21])] == [50, 3, 3, 21]
        sample = data[7]
        sample["x"].zero_()
        assert data[7]["x"].any(), "what a user changes is its own"
        with pytest.raises(IndexError):
            data[ROWS]
        data.close()
        assert len(data) == ROWS
    data = SealedDataset(path, columns=["label"], transform=lambda sample: int(sample["label"]) * 2, **pins)
    assert list(data) == list(range(0, 2 * ROWS, 2))


def test_only_the_chunks_of_the_rows_are_read(
    tmp_path: Path, owner: SigningKey, identity: Identity, pins: dict[str, Any]
) -> None:
    path = tmp_path / "wide.sealed"
    wide = {"x": torch.arange(8 * 2**18, dtype=torch.int32).reshape(8, 2**18)}  # eight rows of a chunk each
    sealed.save_file(wide, path, recipients=[identity.recipient], sign=owner)
    data = SealedDataset(path, cache=0, **pins)
    reader = data._open()._files[0]._reader
    assert reader.bytes_read == 0
    assert torch.equal(data[5]["x"], wide["x"][5]) and reader.bytes_read == 2**20
    assert len(data._blocks) == 1, "with cache=0 no more than one block of a column is kept"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_torch(path: Path, pins: dict[str, Any], workers: int) -> None:
    data = SealedDataset(path, **pins)
    sealed_loader = SealedDataLoader(
        data, batch_size=8, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(5)
    )
    plain_loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))
    for one, two in zip(sealed_loader, plain_loader, strict=True):
        check(one)
        assert torch.equal(one["x"], two["x"]) and torch.equal(one["label"], two["label"])
    assert sorted(labels(sealed_loader)) == list(range(ROWS))  # another epoch, other workers


def collated(samples: list[Any]) -> Any:
    """Everything that a batch can be made of."""
    return [torch.stack([one["x"] for one in samples]), (samples[0]["label"], "text", 1.5, None),
            {"n": len(samples), 7: torch.zeros(0, 3, dtype=torch.bfloat16), "raw": b"\0"}]  # fmt: skip


def test_a_batch_of_any_structure(path: Path, pins: dict[str, Any]) -> None:
    data = SealedDataset(path, **pins)
    theirs = next(iter(DataLoader(data, batch_size=4, collate_fn=collated)))
    ours = next(iter(SealedDataLoader(data, batch_size=4, collate_fn=collated, num_workers=1)))
    assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]
    assert ours[2]["n"] == 4 and ours[2][7].shape == (0, 3) and ours[2][7].dtype == torch.bfloat16
    assert ours[2]["raw"] == b"\0"
    loader = SealedDataLoader(data, collate_fn=lambda samples: {1, 2}, num_workers=1)
    with pytest.raises(UsageError, match="a worker's batch"):
        next(iter(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffled_stream_gives_each_row_once(folder: Path, pins: dict[str, Any], workers: int) -> None:
    def order(epoch: int, rank: int = 0, world_size: int = 1, seed: int = 1) -> list[int]:
        data = SealedIterableDataset(folder, shuffle=True, seed=seed, rank=rank, world_size=world_size, **pins)
        data.set_epoch(epoch)
        return labels(SealedDataLoader(data, batch_size=7, num_workers=workers))

    first = order(0)
    assert sorted(first) == list(range(ROWS)) != first
    assert order(0) == first
    if not workers:
        assert order(1) != first and order(0, seed=2) != first
        assert sorted(order(0, 0, 2) + order(0, 1, 2)) == list(range(ROWS))
        plain = SealedIterableDataset(folder, **pins)
        assert [int(sample["label"]) for sample in plain] == list(range(ROWS))


def test_workers_that_persist_after_an_epoch_was_left_early(path: Path, pins: dict[str, Any]) -> None:
    data = SealedDataset(path, **pins)
    loader = SealedDataLoader(data, batch_size=4, num_workers=2, persistent_workers=True)
    assert next(iter(loader))["label"].tolist() == [0, 1, 2, 3]
    for _ in range(2):
        assert labels(loader) == list(range(ROWS))


# Plaintext on the way


def mapped(pid: int) -> bytes:
    """What a process has mapped from files of shared memory, deleted ones too."""
    found = b""
    process = Path(f"/proc/{pid}")
    with (process / "maps").open() as maps, (process / "mem").open("rb", buffering=0) as memory:
        for line in maps:
            if "/dev/shm" in line or "/torch_" in line or "/memfd:" in line:
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                memory.seek(start)
                found += memory.read(end - start)
    return found


def files(*folders: str) -> bytes:
    found = b""
    for folder in folders:
        for path in Path(folder).rglob("*"):
            try:
                if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24:
                    found += path.read_bytes()
            except OSError:
                continue  # somebody else's, or gone meanwhile
    return found


def seen(loader: Any, folder: Path) -> list[bool]:
    """While a loader's batches are there: whether shared memory, or files, hold the canary."""
    found = []
    iterator = iter(loader)
    kept = [next(iterator), next(iterator)]
    found.append(CANARY[:-1] in mapped(os.getpid()))
    found.append(CANARY[:-1] in files("/dev/shm", str(folder)))
    kept.extend(iterator)
    assert sorted(labels(kept)) == list(range(ROWS))
    return found


class Plain:
    """A dataset of tensors, as anyone has it."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in columns().items()}


@pytest.mark.threat("CKPT-11")
def test_no_plaintext_in_shared_memory_between_workers(
    path: Path, pins: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"batch_size": 10, "num_workers": 2}
    assert seen(DataLoader(Plain(), **options), tmp_path)[0], "the control: torch's own loader"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    data = SealedDataset(path, **pins)
    assert seen(SealedDataLoader(data, **options), tmp_path) == [False, False]
    stream = SealedIterableDataset(path, **pins)
    assert seen(SealedDataLoader(stream, **options), tmp_path) == [False, False]


@pytest.mark.threat("CKPT-11")
def test_torchs_own_loader_gets_nothing_in_its_workers(path: Path, pins: dict[str, Any]) -> None:
    for data in (SealedDataset(path, **pins), SealedIterableDataset(path, **pins)):
        with pytest.raises(UsageError, match="shared memory"):
            next(iter(DataLoader(data, batch_size=4, num_workers=1)))
        # Also after our loader has used it, and behind a wrapper.
        assert next(iter(SealedDataLoader(data, batch_size=4, num_workers=1)))["x"].shape == (4, len(CANARY))
        with pytest.raises(UsageError, match="shared memory"):
            next(iter(DataLoader(data, batch_size=4, num_workers=1)))
    subset = Subset(SealedDataset(path, **pins), [5, 6])
    with pytest.raises(UsageError, match="shared memory"):
        next(iter(DataLoader(subset, num_workers=1)))
    assert labels(SealedDataLoader(subset, num_workers=1)) == [5, 6]


@pytest.mark.threat("CKPT-11")
def test_a_batch_changed_repeated_or_put_before_another_on_the_way() -> None:
    identity = Identity.generate()
    sender, receiver = handoff._Sender(identity.recipient), handoff._Receiver(identity)
    batches = [sender.seal({"n": torch.tensor([number])}) for number in range(3)]
    assert b"canary" not in bytes(handoff._Sender(identity.recipient).seal([CANARY]).data)
    assert receiver.open(batches[0])["n"].tolist() == [0]
    renumbered = handoff.SealedBatch(batches[0].suite, batches[0].box, 1, batches[0].data)
    for bad in (batches[0], renumbered, flipped(batches[1]), short(batches[1])):
        with pytest.raises(Tampered):
            receiver.open(bad)
    assert receiver.open(batches[2])["n"].tolist() == [2]
    with pytest.raises(Tampered):
        receiver.open(batches[1])
    with pytest.raises(Tampered):
        handoff._Receiver(Identity.generate()).open(batches[2])


def flipped(batch: Any) -> Any:
    data = bytearray(batch.data)
    data[3] ^= 1
    return handoff.SealedBatch(batch.suite, batch.box, batch.number, data)


def short(batch: Any) -> Any:
    return handoff.SealedBatch(batch.suite, batch.box, batch.number, batch.data[:20])


# Keys


def factory() -> Identity:
    """Where a worker gets its identity: a test has it in its code."""
    return Identity(Secret(b"identity".ljust(32, b".")))


@pytest.mark.threat("CKPT-12")
def test_no_key_is_pickled(path: Path, pins: dict[str, Any], identity: Identity) -> None:
    data = SealedDataset(path, **pins)
    assert len(data) == ROWS
    with pytest.raises(UsageError, match="keys do not travel"):
        pickle.dumps(data)
    signed = {"signed_by": pins["signed_by"]}
    with_factory = SealedDataset(path, identity_factory=factory, **signed)
    assert with_factory[1]["label"] == 1
    raw = pickle.dumps(with_factory)
    assert CANARY[:-1] not in raw and b"identity...." not in raw
    assert pickle.loads(raw)[2]["label"] == 2
    loader = SealedDataLoader(data, num_workers=1)
    loader_identity = loader._receiver._identity
    raw = pickle.dumps(loader.collate_fn)
    assert bytes(loader_identity._seed.expose()) not in raw


PROGRAM = """
from isolate import Identity
from isolate.crypto.secret import Secret

def factory():
    return Identity(Secret(b"identity".ljust(32, b".")))
"""


@pytest.mark.slow
@pytest.mark.threat("CKPT-12")
def test_workers_that_are_spawned(
    path: Path, pins: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = SealedDataset(path, **pins)
    options: dict[str, Any] = {"batch_size": 10, "num_workers": 2, "multiprocessing_context": "spawn"}
    with pytest.raises(UsageError, match="keys do not travel"):
        next(iter(SealedDataLoader(data, **options)))
    (tmp_path / "where_keys_are.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.import_module("where_keys_are").factory
    data = SealedDataset(path, identity_factory=found, signed_by=pins["signed_by"])
    assert seen(SealedDataLoader(data, **options), tmp_path) == [False, False]
    with pytest.raises(UsageError, match="shared memory"):
        next(iter(DataLoader(data, **options)))


@pytest.mark.threat("CKPT-12")
def test_a_forked_worker_opens_its_own(path: Path, pins: dict[str, Any]) -> None:
    class Counting:
        """An identity that says in which process it was asked."""

        def __init__(self, inner: Identity, log: Path) -> None:
            self.inner, self.log = inner, log

        def unlock(self, facts: Any) -> Any:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()}\n")
            return sealed.open_file_key(facts, self.inner)

    log = path.parent / "asked"
    data = SealedDataset(path, identity=Counting(pins["identity"], log), signed_by=pins["signed_by"])
    assert len(data) == ROWS
    assert sorted(labels(SealedDataLoader(data, batch_size=10, num_workers=2))) == list(range(ROWS))
    asked = [int(line) for line in log.read_text().split()]
    assert len(asked) == len(set(asked)) == 3 and asked[0] == os.getpid()


class Releasing:
    """A workload: to its own process the service releases keys; the platform's socket is not a worker's."""

    def __init__(self, inner: Identity) -> None:
        self.inner, self.pid, self.releases = inner, os.getpid(), 0

    def unlock(self, facts: Any) -> Any:
        if os.getpid() != self.pid:
            raise ReleaseRefused("a worker asked")
        self.releases += 1
        return sealed.compartment_keys(sealed.open_file_key(facts, self.inner), facts)


@pytest.mark.parametrize("stream", [False, True])
def test_forked_workers_have_what_was_released_to_their_parent(
    stream: bool, path: Path, folder: Path, pins: dict[str, Any], identity: Identity
) -> None:
    for where in (path, folder):
        workload = Releasing(identity)
        kind = SealedIterableDataset if stream else SealedDataset
        data = kind(where, identity=workload, signed_by=pins["signed_by"])
        for _ in range(2):
            assert sorted(labels(SealedDataLoader(data, batch_size=10, num_workers=2))) == list(range(ROWS))
        assert workload.releases == 1
        if not stream:
            assert labels(SealedDataLoader(Subset(data, [5, 6]), num_workers=1)) == [5, 6]
        data.close()
        assert len(list(data)) == ROWS and workload.releases == 2, "what was closed is asked for again"


# What is refused


def test_a_dataset_that_is_not_what_it_must_be(
    path: Path, folder: Path, pins: dict[str, Any], tmp_path: Path, owner: SigningKey, identity: Identity
) -> None:
    def code(where: Path = path, **changes: Any) -> type[Exception]:
        with pytest.raises(Exception) as caught:
            len(SealedDataset(where, **(pins | changes)))
        return type(caught.value)

    assert code(signed_by=None) is UnauthenticatedOrigin
    assert code(signed_by=SigningKey.generate().verifying_key) is UnauthenticatedOrigin
    assert code(identity=Identity.generate()) is NoRecipient
    assert code(expect=sealed.Epoch(4)) is RolledBack
    assert code(columns=["y"]) is UsageError
    uneven = tmp_path / "uneven.sealed"
    tensors = {"x": np.zeros((3, 2)), "label": np.zeros(4)}
    sealed.save_file(tensors, uneven, recipients=[identity.recipient], sign=owner)
    assert code(uneven) is MalformedError
    scalar = tmp_path / "scalar.sealed"
    sealed.save_file({"x": np.array(1)}, scalar, recipients=[identity.recipient], sign=owner)
    assert code(scalar) is MalformedError
    (folder / "shard-00002.sealed").write_bytes((folder / "shard-00001.sealed").read_bytes())
    assert code(folder) in (RolledBack, Truncated)
    with pytest.raises(UsageError, match="identity"):
        SealedDataset(path)
    with pytest.raises(UsageError):
        SealedIterableDataset(path, rank=1, **pins)


def test_a_changed_chunk_is_refused_when_its_row_is_read(path: Path, pins: dict[str, Any]) -> None:
    data = SealedDataset(path, **pins)
    assert len(data) == ROWS
    raw = bytearray(path.read_bytes())
    raw[65536] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Tampered):
        data[0]
    with pytest.raises(Tampered):
        next(iter(SealedDataLoader(data, num_workers=1)))
