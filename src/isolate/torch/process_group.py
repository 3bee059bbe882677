"""The process group "isolate": the collectives of torch.distributed between attested ranks, encrypted.

    >>> import torch, torch.distributed as dist
    >>> from isolate.torch.process_group import IsolateProcessGroup
    >>> issubclass(IsolateProcessGroup, dist.ProcessGroup)
    True

``dist.init_process_group("isolate")`` makes one; nobody else has to. Any shape, any stride; CUDA tensors are
copied to pinned memory of the host and back. What can be reduced: bfloat16, float16, float32, float64, integers and
bool, by sum, average (of floats), product, minimum, maximum and, for integers, by bits. What is not reduced may
have any dtype. Raises UsageError for what it cannot do, before anything is sent; RankFailed, on every rank, when a
rank is gone, hostile, late or in another collective. After that the group is over.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from isolate.errors import IsolateError, RankFailed, UsageError
from isolate.torch import algorithms
from isolate.torch.dtypes import Reduction, flat_bytes
from isolate.torch.links import Links, Peers
from isolate.torch.points import Points
from isolate.torch.rendezvous import Store
from isolate.torch.staging import Staged, blocks_of, devices_of, same_place
from isolate.torch.talk import Head, Operation, Talk
from isolate.torch.work import Queue, Task

_SUM = dist.ReduceOp.SUM
_LIVE: weakref.WeakSet[IsolateProcessGroup] = weakref.WeakSet()


class IsolateProcessGroup(dist.ProcessGroup):
    """One group of ranks. ``ranks``: the global ranks of its members, in the order of their ranks in the group."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        peers: Peers,
        group: str = "",
        ranks: Sequence[int] = (),
        timeout: float = 1800.0,
    ) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._group_name, self._group_desc = group, "undefined"
        self._pid = os.getpid()
        self._number = 0
        self._timeout = timeout
        self._operation: tuple[str, float] | None = None
        members = tuple(ranks) or tuple(range(size))
        self._links = Links(store, rank, members, group=group, peers=peers, timeout=timeout)
        self._points = Points(self._links)
        self._links.watched.append(self._look)
        self._queue = Queue(f"group-{group}"[:40])
        _LIVE.add(self)

    # What torch asks about the group.

    def name(self) -> str:
        return "isolate"

    getBackendName = name

    def rank(self) -> int:
        return self._rank

    getRank = rank

    def size(self) -> int:
        return self._size

    getSize = size

    def getGroupName(self) -> str:
        return self._group_name

    def setGroupName(self, name: str) -> None:
        self._group_name = name

    def getGroupDesc(self) -> str:
        return self._group_desc

    def setGroupDesc(self, description: str) -> None:
        self._group_desc = description

    # The attributes too: torch's own are those of the class in C++.
    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    def _set_group_desc(self, description: str) -> None:
        self._group_desc = description

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout.total_seconds()

    def __repr__(self) -> str:
        return f"IsolateProcessGroup(rank {self._rank} of {self._size})"

    # How a collective runs.

    def _seconds(self, options: Any) -> float:
        timeout = getattr(options, "timeout", None)
        seconds = timeout.total_seconds() if timeout is not None else 0
        return seconds if seconds > 0 else self._timeout

    def _submit(
        self,
        name: str,
        head: Callable[[int], Head],
        run: Callable[[Talk], None],
        staged: Sequence[Staged],
        result: Any,
        options: Any,
    ) -> Task:
        """Queue one collective. ``run`` works on the host memory of ``staged``, its tensors."""
        if os.getpid() != self._pid:
            raise UsageError(
                "a process group does not live on in a forked process",
                hint="use init_process_group in each process",
            )
        seconds = self._seconds(options)
        self._number += 1
        number = self._number

        def work() -> None:
            links = self._links
            links.check()
            self._operation = name, time.monotonic() + seconds
            links.started, links.moved = number, time.monotonic()
            try:
                for one in staged:
                    one.fetch()
                run(Talk(links, head(number)))
                for one in staged:
                    one.store()
            except IsolateError:
                raise
            except BaseException:
                # The others wait for the rest of this collective, which will not come.
                rank = links.ranks[self._rank]
                links.fail(RankFailed(f"rank {rank} failed: it was interrupted in {name}", rank=rank))
                raise
            finally:
                self._operation = links.waiting = None

        task = Task(
            work, result, devices=devices_of(staged), late=lambda: self._links.late(name, self._links.waiting)
        )
        self._queue.submit(task, now=getattr(options, "asyncOp", True) is False)
        return task

    def _look(self, now: float) -> tuple[str, int | None] | None:
        """For the watch: whether the collective that runs is late."""
        operation = self._operation
        if operation is None or now <= operation[1]:
            return None
        return operation[0], self._links.waiting

    # Collectives.

    def allreduce(self, tensors: Any, options: Any = None) -> Task:
        return self._reduced("all_reduce", _list(tensors), options)

    def allreduce_coalesced(self, tensors: Any, options: Any = None) -> Task:
        return self._reduced("all_reduce_coalesced", _list(tensors), options)

    def _reduced(self, name: str, tensors: list[Any], options: Any) -> Task:
        op = getattr(options, "reduceOp", _SUM)
        staged = [Staged(tensor) for tensor in tensors]
        reductions = [Reduction.of(op, one.dtype, self._size) for one in staged]
        first = reductions[0]
        total = sum(one.bytes for one in staged)

        def run(talk: Talk) -> None:
            for one, reduction in zip(staged, reductions, strict=True):
                algorithms.all_reduce(talk, flat_bytes(one.host), reduction)

        def head(number: int) -> Head:
            return Head(Operation.ALL_REDUCE, number, first.number, first.dtype, 0, total)

        return self._submit(name, head, run, staged, tensors, options)

    def broadcast(self, tensors: Any, options: Any = None) -> Task:
        tensor = _one(_list(tensors), "broadcast")
        root = getattr(options, "rootRank", 0)
        staged = Staged(tensor)

        def run(talk: Talk) -> None:
            algorithms.broadcast(talk, flat_bytes(staged.host), root)

        def head(number: int) -> Head:
            return Head(Operation.BROADCAST, number, root=root, size=staged.bytes)

        return self._submit("broadcast", head, run, [staged], [tensor], options)

    def reduce(self, tensors: Any, options: Any = None) -> Task:
        tensor = _one(_list(tensors), "reduce")
        root = getattr(options, "rootRank", 0)
        staged = Staged(tensor, writes=self._rank == root)
        reduction = Reduction.of(getattr(options, "reduceOp", _SUM), staged.dtype, self._size)

        def run(talk: Talk) -> None:
            algorithms.reduce(talk, flat_bytes(staged.host), root, reduction)

        def head(number: int) -> Head:
            return Head(Operation.REDUCE, number, reduction.number, reduction.dtype, root, staged.bytes)

        return self._submit("reduce", head, run, [staged], [tensor], options)

    def allgather(self, outputs: Any, inputs: Any, options: Any = None) -> Task:
        mine, lists = _one(_list(inputs), "all_gather"), _one(list(outputs), "all_gather")
        self._sized(lists, "all_gather")
        source, targets = Staged(mine, writes=False), [Staged(one, reads=False) for one in lists]
        if targets[self._rank].bytes != source.bytes:
            raise UsageError("all_gather: the rank's own output has another size than its input")

        def run(talk: Talk) -> None:
            blocks = [flat_bytes(one.host) for one in targets]
            blocks[self._rank][:] = flat_bytes(source.host)
            algorithms.all_gather(talk, blocks)

        return self._submit(
            "all_gather", _plain(Operation.ALL_GATHER), run, [source, *targets], [list(lists)], options
        )

    def _allgather_base(self, output: Any, input: Any, options: Any = None) -> Task:
        return self._gathered([output], [input], options, output)

    all_gather_single = _allgather_base

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, options: Any = None) -> Task:
        return self._gathered(_list(outputs), _list(inputs), options, list(outputs))

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def allgather_coalesced(self, outputs: Any, inputs: Any, options: Any = None) -> Task:
        """``outputs[rank][tensor]``; ``inputs[tensor]``."""
        lists = [list(one) for one in outputs]
        self._sized(lists, "all_gather_coalesced")
        sources = [Staged(one, writes=False) for one in inputs]
        targets = [[Staged(one, reads=False) for one in each] for each in lists]

        def run(talk: Talk) -> None:
            for place, source in enumerate(sources):
                blocks = [flat_bytes(each[place].host) for each in targets]
                blocks[self._rank][:] = flat_bytes(source.host)
                algorithms.all_gather(talk, blocks)

        staged = [*sources, *(one for each in targets for one in each)]
        return self._submit("all_gather", _plain(Operation.ALL_GATHER), run, staged, lists, options)

    def _gathered(self, outputs: list[Any], inputs: list[Any], options: Any, result: Any) -> Task:
        targets = [Staged(one, reads=False) for one in outputs]
        sources = [Staged(one, writes=False) for one in inputs]
        for target, source in zip(targets, sources, strict=True):
            if target.bytes != self._size * source.bytes:
                raise UsageError(f"all_gather: the output is not {self._size} times the input")

        def run(talk: Talk) -> None:
            for target, source in zip(targets, sources, strict=True):
                whole, own = flat_bytes(target.host), flat_bytes(source.host)
                blocks = [whole[rank * len(own) : (rank + 1) * len(own)] for rank in range(self._size)]
                if len(own) and not same_place(source.host, target.host, self._rank * len(own)):
                    blocks[self._rank][:] = own
                algorithms.all_gather(talk, blocks)

        return self._submit("all_gather", _plain(Operation.ALL_GATHER), run, [*sources, *targets], result, options)

    def reduce_scatter(self, outputs: Any, inputs: Any, options: Any = None) -> Task:
        output, lists = _one(_list(outputs), "reduce_scatter"), _one(list(inputs), "reduce_scatter")
        self._sized(lists, "reduce_scatter")
        target, sources = Staged(output, reads=False), [Staged(one, writes=False) for one in lists]
        reduction = Reduction.of(getattr(options, "reduceOp", _SUM), target.dtype, self._size)
        if sources[self._rank].bytes != target.bytes or any(one.dtype != target.dtype for one in sources):
            raise UsageError("reduce_scatter: the output is not like the rank's own input")

        def run(talk: Talk) -> None:
            blocks = [flat_bytes(one.host) for one in sources]
            algorithms.reduce_scatter(talk, blocks, flat_bytes(target.host), reduction)

        head = _plain(Operation.REDUCE_SCATTER, reduction)
        return self._submit("reduce_scatter", head, run, [*sources, target], [output], options)

    def _reduce_scatter_base(self, output: Any, input: Any, options: Any = None) -> Task:
        return self._scattered([output], [input], options, output)

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, options: Any = None) -> Task:
        return self._scattered(_list(outputs), _list(inputs), options, list(outputs))

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def _scattered(self, outputs: list[Any], inputs: list[Any], options: Any, result: Any) -> Task:
        targets = [Staged(one, reads=False) for one in outputs]
        sources = [Staged(one, writes=False) for one in inputs]
        op = getattr(options, "reduceOp", _SUM)
        reductions = [Reduction.of(op, one.dtype, self._size) for one in targets]
        for target, source in zip(targets, sources, strict=True):
            if source.bytes != self._size * target.bytes or source.dtype != target.dtype:
                raise UsageError(f"reduce_scatter: the input is not {self._size} times the output")

        def run(talk: Talk) -> None:
            for target, source, reduction in zip(targets, sources, reductions, strict=True):
                whole, out = flat_bytes(source.host), flat_bytes(target.host)
                blocks = [whole[rank * len(out) : (rank + 1) * len(out)] for rank in range(self._size)]
                algorithms.reduce_scatter(talk, blocks, out, reduction)

        head = _plain(Operation.REDUCE_SCATTER, reductions[0])
        return self._submit("reduce_scatter", head, run, [*sources, *targets], result, options)

    def alltoall_base(
        self, output: Any, input: Any, output_splits: Any = (), input_splits: Any = (), options: Any = None
    ) -> Task:
        target, source = Staged(output, reads=False), Staged(input, writes=False)
        sends = self._splits(input, source.bytes, input_splits)
        recvs = self._splits(output, target.bytes, output_splits)
        if sends[self._rank] != recvs[self._rank]:
            raise UsageError("all_to_all: what the rank keeps has another size at the other end")

        def run(talk: Talk) -> None:
            whole, out = flat_bytes(source.host), flat_bytes(target.host)
            algorithms.all_to_all(talk, blocks_of(whole, sends), blocks_of(out, recvs))

        return self._submit("all_to_all", _plain(Operation.ALL_TO_ALL), run, [source, target], output, options)

    all_to_all_single = alltoall_base

    def _splits(self, tensor: Any, size: int, splits: Any) -> list[int]:
        """Bytes for each rank, of the rows of a tensor."""
        rows = tensor.shape[0] if tensor.dim() else 0
        if not splits:
            if rows % self._size:
                raise UsageError("all_to_all: the first dimension does not divide evenly, and no splits are given")
            return [size // self._size] * self._size
        if len(splits) != self._size or sum(splits) != rows or min(splits) < 0:
            raise UsageError("all_to_all: the splits are not those of the first dimension")
        each = size // rows if rows else 0
        return [each * one for one in splits]

    def alltoall(self, outputs: Any, inputs: Any, options: Any = None) -> Task:
        self._sized(outputs, "all_to_all")
        self._sized(inputs, "all_to_all")
        targets = [Staged(one, reads=False) for one in outputs]
        sources = [Staged(one, writes=False) for one in inputs]
        if targets[self._rank].bytes != sources[self._rank].bytes:
            raise UsageError("all_to_all: what the rank keeps has another size at the other end")

        def run(talk: Talk) -> None:
            sends, recvs = ([flat_bytes(one.host) for one in each] for each in (sources, targets))
            algorithms.all_to_all(talk, sends, recvs)

        staged = [*sources, *targets]
        return self._submit("all_to_all", _plain(Operation.ALL_TO_ALL), run, staged, list(outputs), options)

    def gather(self, outputs: Any, inputs: Any, options: Any = None) -> Task:
        root = getattr(options, "rootRank", 0)
        mine = _one(_list(inputs), "gather")
        source, targets = Staged(mine, writes=False), self._rooted(outputs, root, "gather", reads=False)
        if targets and targets[root].bytes != source.bytes:
            raise UsageError("gather: the root's own output has another size than its input")

        def run(talk: Talk) -> None:
            blocks = [flat_bytes(one.host) for one in targets]
            algorithms.gather(talk, flat_bytes(source.host), blocks, root)

        head = _plain(Operation.GATHER, root=root)
        return self._submit("gather", head, run, [source, *targets], [one.tensor for one in targets], options)

    def scatter(self, outputs: Any, inputs: Any, options: Any = None) -> Task:
        root = getattr(options, "rootRank", 0)
        output = _one(_list(outputs), "scatter")
        target, sources = Staged(output, reads=False), self._rooted(inputs, root, "scatter", writes=False)
        if sources and sources[root].bytes != target.bytes:
            raise UsageError("scatter: the root's own input has another size than its output")

        def run(talk: Talk) -> None:
            blocks = [flat_bytes(one.host) for one in sources]
            algorithms.scatter(talk, blocks, flat_bytes(target.host), root)

        head = _plain(Operation.SCATTER, root=root)
        return self._submit("scatter", head, run, [*sources, target], [output], options)

    def _rooted(self, lists: Any, root: int, name: str, **how: bool) -> list[Staged]:
        """The tensors that only the root has."""
        if self._rank != root:
            return []
        tensors = _one(list(lists), name)
        self._sized(tensors, name)
        return [Staged(one, **how) for one in tensors]

    def barrier(self, options: Any = None, **_: Any) -> Task:
        return self._submit("barrier", _plain(Operation.BARRIER), algorithms.barrier, [], [], options)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier that names every rank that does not come. Raises RankFailed; then the group is over."""
        options = dist.BarrierOptions()
        options.asyncOp = False
        if timeout is not None:
            options.timeout = timeout
        head = _plain(Operation.MONITORED_BARRIER)
        # Every failure by time names all that are missing, so ``wait_all_ranks`` asks for nothing more.
        self._submit("monitored_barrier", head, algorithms.barrier, [], [], options).wait()

    # Point to point.

    def send(self, tensors: Any, to: int, tag: int = 0) -> Task:
        staged = Staged(_one(_list(tensors), "send"), writes=False)
        staged.fetch()
        task = self._point(staged, [])
        self._points.send(to, tag, flat_bytes(staged.host), self._timeout, lambda _, error: task.finish(error))
        return task

    def recv(self, tensors: Any, source: int, tag: int = 0) -> Task:
        return self._receive(tensors, source, tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Task:
        return self._receive(tensors, None, tag)

    def _receive(self, tensors: Any, source: int | None, tag: int) -> Task:
        tensor = _one(_list(tensors), "recv")
        staged = Staged(tensor, reads=False)
        staged.fetch()
        task = self._point(staged, [tensor])

        def done(who: int, error: BaseException | None) -> None:
            task.source = who
            if error is None:
                staged.store()
            task.finish(error)

        self._points.recv(source, tag, flat_bytes(staged.host), self._timeout, done)
        return task

    def _point(self, staged: Staged, result: Any) -> Task:
        if os.getpid() != self._pid:
            raise UsageError("a process group does not live on in a forked process")
        return Task(None, result, devices=devices_of([staged]), late=lambda: self._links.late("a message", None))

    # Ending.

    def shutdown(self) -> None:
        """Do what is queued, and leave. The others may still take what we sent."""
        if os.getpid() == self._pid:
            self._queue.close()
            self._links.close()

    def abort(self) -> None:
        """End the group at once; the others are told that this rank gave up."""
        if os.getpid() != self._pid:
            return
        rank = self._links.ranks[self._rank]
        self._links.fail(RankFailed(f"rank {rank} failed: it aborted the group", rank=rank, code="rank_aborted"))
        self._queue.close(self._links.failure)
        self._links.close(orderly=False)

    def _sized(self, tensors: Sequence[Any], name: str) -> None:
        if len(tensors) != self._size:
            raise UsageError(f"{name}: a list of {len(tensors)} tensors for {self._size} ranks")


@atexit.register
def _leave() -> None:
    """Whoever ends without destroy_process_group leaves, instead of being gone."""
    for group in list(_LIVE):
        with contextlib.suppress(Exception):
            group.shutdown()


def _list(tensors: Any) -> list[Any]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _one(items: list[Any], name: str) -> Any:
    if len(items) != 1:
        raise UsageError(f"{name}: {len(items)} tensors of one rank, and one is taken")
    return items[0]


def _plain(operation: Operation, reduction: Reduction | None = None, root: int = 0) -> Callable[[int], Head]:
    number, dtype = (reduction.number, reduction.dtype) if reduction else (0, 0)
    return lambda count: Head(operation, count, number, dtype, root)
