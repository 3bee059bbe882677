"""Ranks as processes: a program that forks them, since importing torch in each would take seconds.

    python program.py SIZE TIMEOUT AT_ONCE CASE[:ARGUMENT...] ...

For every case the ranks are forked anew, AT_ONCE cases at once, since most of them wait for a limit. A rank prints
nothing, and reports a JSON value or an error through a pipe. One line of JSON comes out per case: {"case",
"seconds", "ranks": [...]}, where a rank is {"value"}, or {"error", "type", "rank", "code"}, or null for the one
that was killed or stopped.
"""

from __future__ import annotations

import datetime
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import isolate.torch  # noqa: E402, F401
from isolate.cli.bench.ranks import Ranks  # noqa: E402
from isolate.errors import IsolateError  # noqa: E402
from isolate.torch import process_group  # noqa: E402

LIMIT = 60.0  # seconds for a case
MEETING = 30.0  # seconds for the ranks to come together: on a busy machine they start far apart
BEGAN: list[float] = []  # of the case, in this rank: once it has set up what is to fail


def start(rank: int, size: int, store: str, ranks: Ranks, timeout: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "isolate",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=max(timeout, MEETING)),
        pg_options=ranks.peers(rank),
    )
    for group in list(process_group._LIVE):
        group.set_timeout(datetime.timedelta(seconds=timeout))
        group._links.timeout = timeout


# Cases that must work. Each returns a JSON value.


def everything(rank: int, size: int) -> Any:
    """The whole Python interface of torch.distributed, against what each call is documented to do."""
    total = size * (size + 1) / 2
    one = torch.full((3, 4), rank + 1.0)
    dist.all_reduce(one)
    assert one.eq(total).all()
    dist.broadcast(one := torch.full((7,), float(rank)), src=size - 1)
    assert one.eq(size - 1).all()
    found: list[Any] = [torch.empty(2) for _ in range(size)]
    dist.all_gather(found, torch.full((2,), float(rank)))
    assert [t[0].item() for t in found] == list(range(size))
    whole = torch.empty(2 * size)
    dist.all_gather_into_tensor(whole, torch.full((2,), float(rank)))
    assert whole.tolist() == [float(k // 2) for k in range(2 * size)]
    out = torch.empty(2)
    dist.reduce_scatter_tensor(out, torch.arange(2.0 * size) * (rank + 1))
    assert out.tolist() == [2.0 * rank * total, (2.0 * rank + 1) * total]
    dist.reduce_scatter(out, [torch.full((2,), float(k)) for k in range(size)])
    assert out.tolist() == [float(rank * size)] * 2
    dist.reduce(one := torch.full((2,), rank + 1.0), dst=1, op=dist.ReduceOp.MAX)
    assert one[0] == (size if rank == 1 else rank + 1)
    parts = [torch.empty(1) for _ in range(size)] if rank == 0 else None
    dist.gather(torch.tensor([float(rank)]), parts, dst=0)
    assert parts is None or [t.item() for t in parts] == list(range(size))
    mine = torch.empty(1)
    dist.scatter(mine, [torch.tensor([10.0 + k]) for k in range(size)] if rank == 0 else None, src=0)
    assert mine.item() == 10 + rank
    got = torch.empty(size)
    dist.all_to_all_single(got, torch.arange(float(size)) + 100 * rank)
    assert got.tolist() == [100.0 * k + rank for k in range(size)]
    outs = [torch.empty(1) for _ in range(size)]
    dist.all_to_all(outs, [torch.tensor([float(10 * rank + k)]) for k in range(size)])
    assert [t.item() for t in outs] == [10.0 * k + rank for k in range(size)]
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": k} for k in range(size)]
    box = [["any", 1] if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    assert box == [["any", 1]]
    dist.barrier()
    # Point to point: by tag out of order, from any source, and both ways at once.
    right, left = (rank + 1) % size, (rank - 1) % size
    first, second = torch.empty(3), torch.empty(300_000)
    waiting = [dist.irecv(second, src=left, tag=2), dist.irecv(first, src=left, tag=1)]
    sending = [
        dist.isend(torch.full((3,), float(rank)), dst=right, tag=1),
        dist.isend(torch.full((300_000,), float(rank)), dst=right, tag=2),
    ]
    for work in (*waiting, *sending):
        work.wait()
    assert first.eq(left).all() and second.eq(left).all()
    if rank == 0:
        seen = {dist.recv(torch.empty(1), tag=9) for _ in range(size - 1)}
        assert seen == set(range(1, size))
    else:
        dist.send(torch.ones(1), dst=0, tag=9)
    ops = [dist.P2POp(dist.isend, torch.full((2,), float(rank)), right), dist.P2POp(dist.irecv, first[:2], left)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert first[0] == left
    # Groups of some ranks, and of the same ranks twice.
    group, again = dist.new_group([0, size - 1]), dist.new_group(list(range(size)))
    if rank in (0, size - 1):
        dist.all_reduce(one := torch.ones(2), group=group)
        assert one.eq(2).all()
    dist.all_reduce(one := torch.ones(200_000), group=again)
    assert one.eq(size).all()
    if rank in (0, size - 1):
        dist.destroy_process_group(group)
    # Asynchronous, in order, and as a future.
    works = [dist.all_reduce(torch.ones(50_000), async_op=True) for _ in range(5)]
    assert all(work.wait() for work in works) and all(work.is_success() for work in works)
    assert works[0].get_future().wait()[0].eq(size).all()
    chained = (
        dist.all_reduce(torch.ones(2), async_op=True).get_future().then(lambda done: done.value()[0].sum().item())
    )
    assert chained.wait() == 2 * size
    assert dist.get_backend() == "isolate" and dist.get_world_size() == size
    dist.group.WORLD.monitored_barrier(datetime.timedelta(seconds=10))
    return "done"


def functional(rank: int, size: int) -> Any:
    import torch.distributed._functional_collectives as funcol

    group = dist.group.WORLD
    whole = funcol.all_gather_tensor(torch.full((2,), float(rank)), 0, group)
    reduced = funcol.all_reduce(torch.ones(3), "sum", group)
    part = funcol.reduce_scatter_tensor(torch.arange(2.0 * size), "avg", 0, group)
    exchanged = funcol.all_to_all_single(torch.full((size,), float(rank)), None, None, group)
    several = funcol.all_reduce_coalesced([torch.ones(2), torch.ones(3)], "sum", group)
    assert whole.tolist() == [float(k // 2) for k in range(2 * size)]
    assert reduced.eq(size).all() and part.tolist() == [2.0 * rank, 2.0 * rank + 1]
    assert exchanged.tolist() == list(map(float, range(size)))
    assert [t.tolist() for t in several] == [[float(size)] * 2, [float(size)] * 3]
    return "done"


def _model() -> Any:
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.Linear(64, 4)
    )


def _batch(rows: int) -> tuple[Any, Any]:
    torch.manual_seed(11)
    return torch.randn(rows, 32), torch.randn(rows, 4)


def _train(model: Any, inputs: Any, targets: Any, steps: int = 5) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return model


def _difference(ours: list[Any], reference: Any) -> float:
    pairs = zip(ours, reference.parameters(), strict=True)
    return max((one.detach() - other.detach()).abs().max().item() for one, other in pairs)


def ddp(rank: int, size: int) -> Any:
    """The largest difference of a weight to training in one process; and whether all ranks have the same bits."""
    inputs, targets = _batch(8 * size)
    model = torch.nn.parallel.DistributedDataParallel(_model(), bucket_cap_mb=0.01)
    _train(model, inputs[8 * rank : 8 * rank + 8], targets[8 * rank : 8 * rank + 8])
    flat = torch.cat([one.detach().reshape(-1) for one in model.parameters()])
    all_flat = [torch.empty_like(flat) for _ in range(size)]
    dist.all_gather(all_flat, flat)
    assert all(torch.equal(one, flat) for one in all_flat)
    return _difference(list(model.module.parameters()), _train(_model(), inputs, targets))


def fsdp(rank: int, size: int) -> Any:
    """FSDP2: fully_shard, trained and gathered again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    inputs, targets = _batch(8 * size)
    model = _model()
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(model, inputs[8 * rank : 8 * rank + 8], targets[8 * rank : 8 * rank + 8])
    whole = [one.full_tensor() for one in model.parameters()]
    return _difference(whole, _train(_model(), inputs, targets))


# Cases in which a rank fails. Each does one collective after another until something raises.

COUNT = 400_000  # elements: long enough that a collective is in the middle when its rank is stopped


def _collective(name: str, rank: int, size: int) -> None:
    long = torch.ones(COUNT)
    if name == "all_reduce":
        dist.all_reduce(long)
    elif name == "small_all_reduce":
        dist.all_reduce(torch.ones(8))
    elif name == "broadcast":
        dist.broadcast(long, src=0)
    elif name == "all_gather":
        dist.all_gather([torch.empty(COUNT) for _ in range(size)], long)
    elif name == "all_gather_into_tensor":
        dist.all_gather_into_tensor(torch.empty(size * COUNT), long)
    elif name == "reduce_scatter":
        dist.reduce_scatter(torch.empty(COUNT), [long] * size)
    elif name == "reduce_scatter_tensor":
        dist.reduce_scatter_tensor(torch.empty(COUNT), torch.ones(size * COUNT))
    elif name == "all_to_all_single":
        dist.all_to_all_single(torch.empty(size * COUNT), torch.ones(size * COUNT))
    elif name == "all_to_all":
        dist.all_to_all([torch.empty(COUNT) for _ in range(size)], [long] * size)
    elif name == "reduce":
        dist.reduce(long, dst=0)
    elif name == "gather":
        dist.gather(long, [torch.empty(COUNT) for _ in range(size)] if rank == 0 else None, dst=0)
    elif name == "scatter":
        dist.scatter(long, [torch.ones(COUNT)] * size if rank == 0 else None, src=0)
    elif name == "barrier":
        dist.barrier()
    elif name == "monitored_barrier":
        dist.group.WORLD.monitored_barrier()
    elif name == "all_gather_object":
        dist.all_gather_object([None] * size, "x" * 100_000)
    elif name == "send_recv":
        right, left = (rank + 1) % size, (rank - 1) % size
        work = dist.isend(long, dst=right)
        dist.recv(torch.empty(COUNT), src=left)
        work.wait()
    elif name == "recv_anysource":
        if rank == 0:
            for _ in range(size - 1):
                dist.recv(torch.empty(COUNT))
        else:
            dist.send(long, dst=0)
    elif name == "sub_group":
        dist.all_reduce(long, group=_collective.group)  # type: ignore[attr-defined]
    elif name == "ddp":
        inputs, targets = _batch(8)
        _train(_collective.model, inputs, targets, steps=1)  # type: ignore[attr-defined]
    else:
        raise ValueError(name)


def failing(rank: int, size: int, name: str, how: str, who: str) -> Any:
    """Rank ``who`` is killed or stopped in the middle of this collective, again and again repeated."""
    if name == "sub_group":
        _collective.group = dist.new_group(list(range(size)))  # type: ignore[attr-defined]
    if name == "ddp":
        _collective.model = torch.nn.parallel.DistributedDataParallel(_model())  # type: ignore[attr-defined]
    for _ in range(3):
        _collective(name, rank, size)
    BEGAN.append(time.monotonic())
    if rank == int(who):
        # Two threads: one is in the collective when the other stops the whole process.
        import threading

        threading.Timer(0.05, os.kill, (os.getpid(), getattr(signal, how))).start()
    while True:
        _collective(name, rank, size)


def absent(rank: int, size: int, who: str) -> Any:
    """One rank goes to sleep and takes no part."""
    dist.barrier()
    if rank == int(who):
        time.sleep(5)
    dist.all_reduce(torch.ones(COUNT))


CASES = {
    "everything": everything,
    "functional": functional,
    "ddp": ddp,
    "fsdp": fsdp,
    "failing": failing,
    "absent": absent,
}


def _report(error: BaseException) -> dict[str, Any]:
    if isinstance(error, IsolateError):
        return {
            "error": str(error),
            "type": type(error).__name__,
            "rank": getattr(error, "rank", None),
            "code": error.code,
        }
    return {
        "error": f"{error}\n{traceback.format_exc()}"[:3000],
        "type": type(error).__name__,
        "rank": None,
        "code": "",
    }


def run(size: int, case: str, timeout: float) -> dict[str, Any]:
    name, *arguments = case.split(":")
    ranks = Ranks()
    began = time.monotonic()
    # No TemporaryDirectory: a rank runs what Python runs at its end, which would delete it under the others.
    folder = tempfile.mkdtemp()
    try:
        children: list[int] = []
        pipes = []
        for rank in range(size):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                try:
                    start(rank, size, f"{folder}/store", ranks, timeout)
                    found: dict[str, Any] = {"value": CASES[name](rank, size, *arguments)}
                    dist.destroy_process_group()
                except BaseException as error:
                    found = _report(error)
                found["seconds"] = round(time.monotonic() - (BEGAN or [began])[0], 2)
                os.write(write, json.dumps(found).encode())
                os.close(write)
                # As a program would: whoever waits for a word of us gets it.
                import atexit

                atexit._run_exitfuncs()
                os._exit(0)
            os.close(write)
            children.append(pid)
            pipes.append(read)
        answers = (
            [_answer(read, began + LIMIT) for read in pipes]
            if name != "failing"
            else _others(pipes, arguments, began)
        )
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    finally:
        shutil.rmtree(folder)
    return {"case": case, "seconds": round(time.monotonic() - began, 2), "ranks": answers}


def _others(pipes: list[int], arguments: list[str], began: float) -> list[Any]:
    """What the ranks say that were not killed or stopped."""
    return [None if rank == int(arguments[2]) else _answer(read, began + LIMIT) for rank, read in enumerate(pipes)]


def _answer(read: int, deadline: float) -> Any:
    text = b""
    while True:
        ready, _, _ = select.select([read], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return {"error": "it hangs", "type": "hang", "rank": None, "code": ""}
        if not (more := os.read(read, 65536)):
            return json.loads(text) if text else {"error": "it died", "type": "died", "rank": None, "code": ""}
        text += more


def spread(size: int, timeout: float, at_once: int, cases: list[str]) -> Iterator[str]:
    """The lines of all cases, as they come: each of ``at_once`` processes takes its share."""
    pipes, children = [], []
    for place in range(at_once):
        read, write = os.pipe()
        if not (pid := os.fork()):
            with os.fdopen(write, "w") as out:
                for case in cases[place::at_once]:
                    print(json.dumps(run(size, case, timeout)), file=out, flush=True)
            os._exit(0)
        os.close(write)
        pipes.append(os.fdopen(read))
        children.append(pid)
    for pipe, pid in zip(pipes, children, strict=True):
        with pipe:
            yield from pipe
        os.waitpid(pid, 0)


if __name__ == "__main__":
    # What a process loads late, before the forks.
    import torch._dynamo
    import torch.distributed._functional_collectives
    import torch.distributed.device_mesh
    import torch.distributed.fsdp

    np.zeros(1)
    socket.setdefaulttimeout(None)
    for line in spread(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]):
        print(line, end="", flush=True)
