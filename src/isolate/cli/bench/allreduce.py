"""The process group "isolate", encrypted and attested, against gloo in the clear: all_reduce, and a step of DDP.

The ranks are processes of this machine that hold both groups all the time; each round measures each once. Ratios
are of throughput: above 1, ours is faster. What `isolate bench checkpoint` measures comes last.

    >>> from isolate.cli.bench.allreduce import SIZES, repeats
    >>> repeats(SIZES["1mib"]), repeats(SIZES["100mib"])
    (32, 2)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

from isolate.cli.bench import Figures, checkpoint, paired
from isolate.cli.bench.ranks import Ranks
from isolate.errors import MissingExtra, UnavailableError

MIB = 1 << 20
ROUNDS = 7
SIZES = {"4kib": 4096, "64kib": 65536, "1mib": MIB, "25mib": 25 * MIB, "100mib": 100 * MIB}
GROUPS = ("isolate", "gloo")
LAYERS, WIDTH = 6, 2048  # 25 million parameters
ROWS = 32  # of a batch
_LIMIT = 120.0  # seconds for one measure


def repeats(size: int) -> int:
    """How many calls make one measure: about 32 MiB, at most 50."""
    return max(2, min(50, 32 * MIB // size))


class _Rank:
    """One rank, in its process: both groups, and what is measured on them."""

    def __init__(self, rank: int, size: int, folder: str, ranks: Ranks) -> None:
        self.torch, self.dist = import_module("torch"), import_module("torch.distributed")
        import_module("isolate.torch")
        self.torch.set_num_threads(1)
        limit = timedelta(seconds=_LIMIT)
        store = self.dist.FileStore(f"{folder}/store", size)
        self.dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        ours = self.dist.new_group(backend="isolate", timeout=limit, pg_options=ranks.peers(rank))
        self.groups = {"isolate": ours, "gloo": self.dist.group.WORLD}
        self.models: dict[str, Callable[[], None]] = {}

    def all_reduce(self, group: str, size: int) -> float:
        """Bytes per second, counted once for the tensor."""
        tensor, count, chosen = self.torch.ones(size // 4), repeats(size), self.groups[group]
        self.dist.all_reduce(tensor, group=chosen)
        self.dist.barrier()
        began = time.perf_counter()
        for _ in range(count):
            self.dist.all_reduce(tensor, group=chosen)
        return size * count / (time.perf_counter() - began)

    def ddp_step(self, group: str, _: int) -> float:
        """Steps per second: forward, backward with its all-reduces, and the optimizer."""
        step = self.models.get(group) or self.models.setdefault(group, self._model(group))
        step()
        self.dist.barrier()
        began = time.perf_counter()
        for _ in range(2):
            step()
        return 2 / (time.perf_counter() - began)

    def _model(self, group: str) -> Callable[[], None]:
        nn = self.torch.nn
        self.torch.manual_seed(0)
        plain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        model = nn.parallel.DistributedDataParallel(plain, process_group=self.groups[group])
        optimizer = self.torch.optim.SGD(model.parameters(), lr=0.01)
        batch = self.torch.randn(ROWS, WIDTH)

        def step() -> None:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

        return step


def _serve(rank: int, size: int, folder: str, ranks: Ranks, orders: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("ignore")
    one = _Rank(rank, size, folder, ranks)
    while True:
        what, group, count = orders.recv()
        if not what:
            break
        orders.send(getattr(one, what)(group, count))
    one.dist.destroy_process_group()


class _Job:
    """The ranks' processes: they do the same at the same time."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def measure(self, what: str, group: str, count: int) -> float:
        """What the slowest rank had."""
        for pipe in self._pipes:
            pipe.send((what, group, count))
        found = []
        for pipe in self._pipes:
            if not pipe.poll(_LIMIT):
                raise UnavailableError("a rank of the benchmark does not answer")
            try:
                found.append(float(pipe.recv()))
            except EOFError:
                raise UnavailableError("a rank of the benchmark is gone") from None
        return min(found)


@contextlib.contextmanager
def _job(size: int) -> Iterator[_Job]:
    context, ranks = multiprocessing.get_context("fork"), Ranks()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, folder, ranks, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            yield _Job(pipes)
        finally:
            for pipe in pipes:
                with contextlib.suppress(OSError):
                    pipe.send(("", "", 0))
            for process in processes:
                process.join(10)
                process.kill()


def run(rounds: int | None, quick: bool) -> tuple[int, Figures]:
    """The figures, as ratios of throughput. Raises MissingExtra, UnavailableError."""
    if find_spec("torch") is None:
        raise MissingExtra("torch is not installed", hint="pip install 'isolate-confidential[torch]'")
    # Once, before the ranks are forked.
    for module in ("torch.distributed", "torch._dynamo"):
        import_module(module)
    turns = rounds or (1 if quick else ROUNDS)
    sizes: dict[str, int] = {"4kib": 4096, "1mib": MIB} if quick else SIZES
    figures: Figures = {}
    for size in (2, 4):
        several = "" if size == 2 else f"{size}_ranks_"
        # More ranks than most machines that run this have cores: fewer rounds, and nothing is promised of them.
        some = turns if size == 2 else max(1, turns // 3)
        with _job(size) as job:
            measures: dict[str, Callable[[], float]] = {}
            ratios: dict[str, tuple[str, str]] = {}
            wanted: list[Any] = [
                ("all_reduce", f"allreduce_{several}{name}", count) for name, count in sizes.items()
            ]
            if size == 2:
                wanted.append(("ddp_step", "ddp_step", 0))
            for what, name, count in wanted:
                for group in GROUPS:
                    measures[f"{name}_{group}"] = partial(job.measure, what, group, count)
                ratios[f"{name}_vs_gloo"] = (f"{name}_isolate", f"{name}_gloo")
            for measure in measures.values():
                measure()
            figures |= paired(some, measures, ratios)
    return turns, figures | checkpoint.run(turns, quick)[1]
