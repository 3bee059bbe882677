"""Sealed checkpoints by real ranks over a process group: DTensors that two ranks save and three load."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from isolate import Identity, SigningKey
from isolate.errors import RolledBack

torch = pytest.importorskip("torch", reason="torch is an extra: pip install 'isolate-confidential[torch]'")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from isolate.torch import checkpoint  # noqa: E402
from isolate.torch.checkpoint import SealedStorageReader, SealedStorageWriter  # noqa: E402

SHAPE = (7, 6)


def ranks(size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` answers in each of ``size`` forked ranks of a gloo group."""
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()

    def run(rank: int) -> None:
        try:
            torch.set_num_threads(1)
            store = torch.distributed.FileStore(str(folder / f"store-{size}-{work.__name__}"), size)
            limit = timedelta(seconds=30)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
            queue.put((rank, work(rank)))
            torch.distributed.destroy_process_group()
        except BaseException:
            queue.put((rank, traceback.format_exc()))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    found = {}
    while not queue.empty():
        rank, answer = queue.get()
        found[rank] = answer
    return [found.get(rank) for rank in range(size)]


@pytest.mark.slow
def test_two_ranks_save_and_three_load(tmp_path: Path, owner: SigningKey, identity: Identity) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    whole = torch.arange(42.0).reshape(SHAPE)

    def state(size: int, tensor: Any) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (size,))
        return {
            "rows": distribute_tensor(tensor, mesh, [Shard(0)]),
            "columns": distribute_tensor(tensor, mesh, [Shard(1)]),
            "alike": distribute_tensor(tensor, mesh, [Replicate()]),
            "plain": tensor.clone(),
            "step": int(tensor.sum()),
        }

    def save(rank: int) -> Any:
        for epoch in (1, 2):
            writer = SealedStorageWriter(
                tmp_path / f"run-{epoch}", recipients=[identity.recipient], sign=owner, epoch=epoch
            )
            dcp.save(state(2, whole), storage_writer=writer)
        future = dcp.async_save(state(2, whole), storage_writer=SealedStorageWriter(
            tmp_path / "async", recipients=[identity.recipient], sign=owner,
        ))  # fmt: skip
        future.result()
        return "saved"

    def load(rank: int) -> Any:
        pins: dict[str, Any] = {"identity": identity, "signed_by": owner.verifying_key}
        for name in ("run-1", "async"):
            found = state(3, torch.zeros(SHAPE))
            dcp.load(found, storage_reader=SealedStorageReader(tmp_path / name, **pins))
            for part in ("rows", "columns", "alike"):
                assert torch.equal(found[part].full_tensor(), whole), part
            assert torch.equal(found["plain"], whole) and found["step"] == int(whole.sum())
        # The operator shows one rank another checkpoint, by what is a path here.
        reader = SealedStorageReader(tmp_path / ("run-2" if rank == 1 else "run-1"), **pins)
        try:
            dcp.load(state(3, torch.zeros(SHAPE)), storage_reader=reader)
        except dcp.api.CheckpointException as error:
            return type(checkpoint.refusal(error)).__name__
        return "loaded"

    assert ranks(2, tmp_path, save) == ["saved", "saved"]
    assert ranks(3, tmp_path, load) == [RolledBack.__name__] * 3


def test_our_error_crosses_the_ranks_with_its_type() -> None:
    """torch pickles what a rank raised, and raises it on all of them."""
    import pickle

    error = pickle.loads(pickle.dumps(RolledBack("checkpoint: older", code="x", hint="y")))
    assert type(error) is RolledBack and (error.code, error.hint, str(error)) == ("x", "y", "checkpoint: older (y)")
