"""The process group, with a thread for each rank: every collective against what it is defined to give."""

from __future__ import annotations

import importlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
dist = importlib.import_module("torch.distributed")

from isolate.cli.bench.ranks import Ranks  # noqa: E402
from isolate.errors import RankFailed, UsageError  # noqa: E402
from isolate.torch import staging  # noqa: E402
from isolate.torch.process_group import IsolateProcessGroup  # noqa: E402

Op = dist.ReduceOp
RANKS = Ranks()


def each(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returned or raised, in a thread for each rank."""
    found: list[Any] = [None] * count

    def one(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "hangs"
    return found


class Job:
    """The groups of all ranks, in one process."""

    def __init__(self, size: int, timeout: float = 20.0) -> None:
        store = dist.HashStore()
        self.size = size
        self.groups = each(
            size, lambda rank: IsolateProcessGroup(store, rank, size, peers=RANKS.peers(rank), timeout=timeout)
        )
        for group in self.groups:
            if isinstance(group, BaseException):
                raise group

    def run(self, work: Callable[[Any, int], Any]) -> list[Any]:
        """Raises what a rank raised."""
        found = each(self.size, lambda rank: work(self.groups[rank], rank))
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return found

    def errors(self, work: Callable[[Any, int], Any]) -> list[Any]:
        return each(self.size, lambda rank: work(self.groups[rank], rank))

    def close(self) -> None:
        each(self.size, lambda rank: self.groups[rank].shutdown())


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def job(request: pytest.FixtureRequest) -> Iterator[Job]:
    made = Job(request.param)
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[Job]:
    made = Job(2)
    yield made
    made.close()


def options(**fields: Any) -> Any:
    return SimpleNamespace(**fields)


SIZES = [1, 7, 20_000, 300_001]  # elements: in a header's message, by a tree, by a ring of several pieces


def test_a_tensor_of_several_sections_goes_around_section_by_section(job: Job) -> None:
    count = 1_300_003  # elements of 4 bytes: more than a section of 2^20 bytes for each of four ranks

    def work(group: Any, rank: int) -> None:
        base = torch.arange(count, dtype=torch.float32) % 1000
        for operation, expected in (
            (Op.SUM, base * job.size + sum(range(job.size))),
            (Op.MAX, base + job.size - 1),
        ):
            tensor = base + rank
            group.allreduce([tensor], options(reduceOp=operation)).wait()
            assert torch.equal(tensor, expected)
        tensor = base * job.size
        group.allreduce([tensor], options(reduceOp=Op.AVG)).wait()
        assert torch.equal(tensor, base * job.size), "divided once, in every section"

    job.run(work)


@pytest.mark.parametrize("count", SIZES)
def test_all_reduce_broadcast_and_reduce(job: Job, count: int) -> None:
    total = sum(range(1, job.size + 1))

    def work(group: Any, rank: int) -> None:
        base = torch.arange(count, dtype=torch.float32)
        tensor = base + rank
        group.allreduce([tensor]).wait()
        assert torch.equal(tensor, base * job.size + total - job.size)
        for root in range(job.size):
            tensor = torch.full((count,), float(rank))
            group.broadcast([tensor], options(rootRank=root)).wait()
            assert tensor.eq(root).all()
            tensor = torch.full((count,), rank + 1.0)
            group.reduce([tensor], options(rootRank=root, reduceOp=Op.SUM)).wait()
            assert tensor.eq(total if rank == root else rank + 1).all()

    job.run(work)


@pytest.mark.parametrize("count", SIZES)
def test_gathering_and_scattering(job: Job, count: int) -> None:
    size = job.size

    def work(group: Any, rank: int) -> None:
        mine = torch.full((count,), float(rank))
        found = [torch.empty(count) for _ in range(size)]
        group.allgather([found], [mine]).wait()
        assert all(one.eq(k).all() for k, one in enumerate(found))
        whole = torch.empty(size * count)
        group._allgather_base(whole, mine).wait()
        assert torch.equal(whole, torch.arange(float(size)).repeat_interleave(count))
        source, out = torch.arange(float(size * count)), torch.empty(count)
        group._reduce_scatter_base(out, source, options(reduceOp=Op.AVG)).wait()
        assert torch.equal(out, source[rank * count : (rank + 1) * count])
        # In place, as FSDP may do it.
        group._reduce_scatter_base(source[rank * count : (rank + 1) * count], source).wait()
        assert torch.allclose(source[rank * count : (rank + 1) * count], out * size)
        group.reduce_scatter([out], [[torch.full((count,), float(k)) for k in range(size)]]).wait()
        assert out.eq(rank * size).all()
        exchanged = torch.empty(size * count)
        group.alltoall_base(exchanged, torch.full((size * count,), float(rank)), [], [], None).wait()
        assert torch.equal(exchanged, torch.arange(float(size)).repeat_interleave(count))
        # Uneven: rank r sends k + 1 rows to rank k.
        got = torch.empty(size * (rank + 1), 2)
        rows = size * (size + 1) // 2
        splits = list(range(1, size + 1))
        group.alltoall_base(got, torch.full((rows, 2), float(rank)), [rank + 1] * size, splits, None).wait()
        assert torch.equal(got[:, 0], torch.arange(float(size)).repeat_interleave(rank + 1))
        group.alltoall(found, [torch.full((count,), float(10 * rank + k)) for k in range(size)]).wait()
        assert all(one.eq(10 * k + rank).all() for k, one in enumerate(found))
        for root in range(size):
            gathered = [[torch.empty(count) for _ in range(size)]] if rank == root else []
            group.gather(gathered, [mine], options(rootRank=root)).wait()
            assert not gathered or all(one.eq(k).all() for k, one in enumerate(gathered[0]))
            given = [[torch.full((count,), float(k)) for k in range(size)]] if rank == root else []
            group.scatter([out], given, options(rootRank=root)).wait()
            assert out.eq(rank).all()
        group.barrier().wait()

    job.run(work)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16,
          torch.int32, torch.int64, torch.bool]  # fmt: skip


def test_every_dtype_by_every_operation(job: Job) -> None:
    """Against torch's own arithmetic, rank after rank: the numbers are small, so that the order does not matter."""
    combine = {"SUM": torch.add, "PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum,
               "BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor}  # fmt: skip

    def work(group: Any, rank: int) -> None:
        for dtype in DTYPES:
            for name, function in combine.items():
                if name in ("BAND", "BOR", "BXOR") and dtype.is_floating_point:
                    continue
                sources = [((torch.arange(40_000) + k) % 3 + (0 if k else 1)).to(dtype) for k in range(job.size)]
                want = sources[0]
                for one in sources[1:]:
                    want = function(want, one)
                tensor = sources[rank].clone()
                group.allreduce([tensor], options(reduceOp=getattr(Op, name))).wait()
                assert torch.equal(tensor, want), (dtype, name)
            if dtype.is_floating_point:
                tensor = torch.full((5,), float(rank), dtype=dtype)
                group.allreduce([tensor], options(reduceOp=Op.AVG)).wait()
                assert torch.allclose(tensor.double(), torch.full((5,), (job.size - 1) / 2, dtype=torch.float64))

    job.run(work)


def test_any_stride_several_at_once_and_complex_numbers(job: Job) -> None:
    def work(group: Any, rank: int) -> None:
        whole = torch.zeros(6, 8)
        whole[:, ::2] = rank + 1.0
        group.allreduce([whole.T[::2]]).wait()
        total = sum(range(1, job.size + 1))
        assert whole[:, ::2].eq(total).all() and whole[:, 1::2].eq(0).all()
        several = [torch.ones(3), torch.ones(200_000), torch.ones(())]
        group.allreduce_coalesced(several).wait()
        assert all(one.eq(job.size).all() for one in several)
        number = torch.full((4,), complex(1, rank))
        group.broadcast([number], options(rootRank=0)).wait()
        assert number.eq(1).all()
        empty = torch.empty(0)
        group.allreduce([empty]).wait()
        outs = [torch.empty(2 * job.size), torch.empty(job.size)]
        group.allgather_into_tensor_coalesced(outs, [torch.full((2,), float(rank)), torch.ones(1)]).wait()
        assert outs[1].eq(1).all() and outs[0][-1] == job.size - 1
        tables = [[torch.empty(2), torch.empty(1)] for _ in range(job.size)]
        group.allgather_coalesced(tables, [torch.full((2,), float(rank)), torch.ones(1)]).wait()
        assert [one[0][0].item() for one in tables] == list(range(job.size))

    job.run(work)


def test_messages_by_tag_and_from_anybody(pair: Job) -> None:
    def work(group: Any, rank: int) -> None:
        if rank == 0:
            waiting = [
                group.send([torch.full((count,), float(tag))], 1, tag)
                for tag, count in ((1, 5), (2, 400_000), (3, 1))
            ]
            for one in waiting:
                one.wait()
            return
        for tag, count in ((3, 1), (2, 400_000)):
            tensor = torch.empty(count)
            group.recv([tensor], 0, tag).wait()
            assert tensor.eq(tag).all()
        tensor = torch.empty(5)
        task = group.recv_anysource([tensor], 1)
        task.wait()
        assert tensor.eq(1).all() and task._source_rank() == 0

    pair.run(work)


def test_a_message_of_another_size_is_told(pair: Job) -> None:
    def work(group: Any, rank: int) -> Any:
        if rank == 0:
            return group.send([torch.ones(3)], 1, 0).wait()
        return group.recv([torch.empty(2)], 0, 0).wait()

    error = pair.errors(work)[1]
    assert isinstance(error, UsageError) and "12 bytes" in str(error)


def test_what_cannot_be_done_is_refused_before_anything_is_sent(pair: Job) -> None:
    group = pair.groups[0]
    for wrong in (
        lambda: group.allreduce([torch.ones(2, dtype=torch.int32)], options(reduceOp=Op.AVG)),
        lambda: group.allreduce([torch.ones(2)], options(reduceOp=Op.BAND)),
        lambda: group.allreduce([torch.ones(2).to_sparse()]),
        lambda: group.allgather([[torch.ones(1)]], [torch.ones(1)]),
        lambda: group._allgather_base(torch.ones(3), torch.ones(2)),
        lambda: group._reduce_scatter_base(torch.ones(3), torch.ones(2)),
        lambda: group.alltoall_base(torch.ones(3), torch.ones(3), [], [], None),
        lambda: group.alltoall_base(torch.ones(3), torch.ones(3), [1, 1], [1, 2], None),
        lambda: group.broadcast([torch.ones(1), torch.ones(1)]),
    ):
        with pytest.raises(UsageError):
            wrong()
    pair.run(lambda group, _: group.barrier().wait())


@pytest.mark.threat("DIST-6")
def test_ranks_in_different_collectives_notice(pair: Job) -> None:
    def work(group: Any, rank: int) -> Any:
        if rank:
            return group.broadcast([torch.ones(4)], options(rootRank=1)).wait()
        return group.allreduce([torch.ones(4)]).wait()

    errors = [one for one in pair.errors(work) if isinstance(one, BaseException)]
    assert errors and all(isinstance(one, RankFailed) for one in errors)
    assert any(one.code == "collective_mismatch" and "broadcast" in str(one) for one in errors)
    with pytest.raises(RankFailed):
        pair.groups[0].barrier().wait()


def test_another_dtype_operation_or_size_is_no_silent_nonsense() -> None:
    for ours, theirs in (
        ((torch.ones(4), Op.SUM), (torch.ones(4), Op.MAX)),
        ((torch.ones(4), Op.SUM), (torch.ones(4, dtype=torch.int32), Op.SUM)),
        ((torch.ones(4), Op.SUM), (torch.ones(50_000), Op.SUM)),
    ):
        job = Job(2, timeout=5)
        both = (ours, theirs)
        found = job.errors(
            lambda group, rank, both=both: group.allreduce([both[rank][0]], options(reduceOp=both[rank][1])).wait()
        )
        assert any(isinstance(one, RankFailed) and one.code == "collective_mismatch" for one in found)
        job.close()


@pytest.mark.threat("DIST-5")
def test_an_absent_rank_is_named_in_time() -> None:
    pair = Job(2, timeout=1.5)
    error = each(1, lambda _: pair.groups[0].allreduce([torch.ones(4)]).wait())[0]
    assert isinstance(error, RankFailed) and error.rank == 1 and "does not take part" in str(error)
    # Whoever comes later is told as well.
    error = each(1, lambda _: pair.groups[1].allreduce([torch.ones(4)]).wait())[0]
    assert isinstance(error, RankFailed) and error.rank == 1
    pair.close()


def test_a_limit_of_one_call_and_of_a_message() -> None:
    job = Job(2, timeout=60)
    error = each(1, lambda _: job.groups[0].monitored_barrier(timedelta(seconds=0.5)))[0]
    assert isinstance(error, RankFailed) and error.rank == 1
    job.close()
    job = Job(2, timeout=1)
    error = each(1, lambda _: job.groups[0].recv([torch.empty(1)], 1, 0).wait())[0]
    assert isinstance(error, RankFailed) and error.rank == 1
    job.close()
    job = Job(2, timeout=60)
    task = job.groups[0].allreduce([torch.ones(4)])
    error = each(1, lambda _: task.wait(timedelta(seconds=0.3)))[0]
    assert isinstance(error, RankFailed) and error.rank == 1
    # The future of the work fails with it, and says the same.
    with pytest.raises(RuntimeError, match="rank 1 failed"):
        task.get_future().wait()
    job.close()


def test_whoever_leaves_is_missed_only_by_those_who_need_it(pair: Job) -> None:
    def work(group: Any, rank: int) -> Any:
        if rank == 0:
            group.broadcast([torch.ones(200_000)], options(rootRank=0)).wait()
            return group.shutdown()
        threading.Event().wait(0.3)
        tensor = torch.zeros(200_000)
        group.broadcast([tensor], options(rootRank=0)).wait()
        assert tensor.eq(1).all()
        return group.barrier().wait()

    found = pair.errors(work)
    assert found[0] is None and isinstance(found[1], RankFailed) and "left" in str(found[1])


def test_a_group_is_closed_while_it_fails(pair: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, just before the one that tells the others is started."""
    links, raised = pair.groups[0]._links, []

    def close() -> None:
        try:
            links.close()
        except BaseException as error:
            raised.append(error)

    closing = threading.Thread(target=close)

    class Farewell(threading.Thread):
        def start(self) -> None:
            if self._target == links._tell_all:  # type: ignore[attr-defined]
                closing.start()
                closing.join(0.2)
            super().start()

    monkeypatch.setattr(threading, "Thread", Farewell)
    links.fail(RankFailed("rank 1 failed: it is gone", rank=1, code="rank_gone"))
    closing.join(20)
    assert (raised, links.closed) == ([], True)


def test_a_group_fails_while_another_is_made(pair: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, just when the groups are gone through that have to know it too."""
    made: list[Job] = []
    making = threading.Thread(target=lambda: made.append(Job(1)))

    class Live(weakref.WeakSet[Any]):
        def __iter__(self) -> Iterator[Any]:
            for one in super().__iter__():
                if making.ident is None:
                    making.start()
                    making.join(0.2)
                yield one

    monkeypatch.setattr("isolate.torch.links._LIVE", live := Live())
    live.add(links := pair.groups[0]._links)
    error = RankFailed("rank 1 failed: it is gone", rank=1, code="rank_gone")
    assert links.fail(error) is error
    making.join(20)
    assert len(live) == 2
    made[0].close()


def test_abort_tells_everybody(pair: Job) -> None:
    found = pair.errors(lambda group, rank: group.abort() if rank else group.allreduce([torch.ones(4)]).wait())
    assert found[1] is None and isinstance(found[0], RankFailed) and found[0].rank == 1
    with pytest.raises(RankFailed):
        pair.groups[1].allreduce([torch.ones(1)]).wait()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_over_sockets_too(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a thread sends: two ranks that send 10 MB at each other do not wait for ever."""
    monkeypatch.setenv("ISOLATE_TRANSPORT", transport)
    job = Job(3)
    assert not job.groups[0]._links.link(1).inline

    def work(group: Any, rank: int) -> None:
        tensor = torch.ones(2_500_000)
        group.allreduce([tensor]).wait()
        assert tensor.eq(3).all()
        out, found = torch.empty(100_000), torch.empty(300_000)
        group._reduce_scatter_base(out, torch.ones(300_000)).wait()
        group._allgather_base(found, out).wait()
        assert found.eq(3).all()
        group.alltoall_base(torch.empty(1_500_000), torch.ones(1_500_000), [], [], None).wait()
        task = group.send([tensor], (rank + 1) % 3, 0)
        group.recv([torch.empty(2_500_000)], (rank - 1) % 3, 0).wait()
        task.wait()

    job.run(work)
    job.close()


def test_staging_with_a_stand_in_for_a_gpu(pair: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: memory that is said not to be the host's takes the way that CUDA tensors take."""
    monkeypatch.setattr(staging, "is_host", lambda _: False)
    monkeypatch.setattr(staging, "devices_of", lambda _: [])
    monkeypatch.setattr("isolate.torch.process_group.devices_of", lambda _: [])
    monkeypatch.setattr(staging, "_told", set())

    def work(group: Any, rank: int) -> None:
        tensor = torch.full((3, 5), rank + 1.0)
        group.allreduce([tensor.T]).wait()
        assert tensor.eq(3).all()
        if rank:
            return group.send([tensor], 0, 0).wait()
        return group.recv([tensor], 1, 0).wait()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair.run(work)
    told = [str(one.message) for one in caught if "NCCL" in str(one.message)]
    assert len(told) == 1 and "in the clear" in told[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_tensors_of_a_gpu(pair: Job) -> None:
    def work(group: Any, rank: int) -> None:
        tensor = torch.full((1_000_000,), rank + 1.0, device="cuda")
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            tensor.mul_(2)
            group.allreduce([tensor]).wait()
        assert tensor.eq(6).all().item()
        assert group.allreduce([tensor]).get_future().wait()[0].device.type == "cuda"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair.run(work)


def test_a_forked_process_is_told(pair: Job) -> None:
    group = pair.groups[0]
    group._pid = os.getpid() + 1  # as it looks in a child
    with pytest.raises(UsageError, match="fork"):
        group.allreduce([torch.ones(1)])
    group._pid = os.getpid()


def test_a_thread_sends_what_is_long_where_there_are_cores() -> None:
    """Whether a rank does is its own affair: the others need not know."""
    job = Job(3)
    assert job.groups[0]._links.link(1).inline, "shared memory, where ranks have a host in common"
    for group in job.groups[:2]:
        group._links.spare = True

    def work(group: Any, rank: int) -> None:
        for _ in range(2):
            tensor = torch.full((2_000_001,), rank + 1.0)
            group.allreduce([tensor]).wait()
            assert tensor.eq(6).all()
            group.broadcast([tensor], options(rootRank=2)).wait()
            group.allreduce([small := torch.ones(3)]).wait()
            assert small.eq(3).all()

    job.run(work)
    assert job.groups[0]._links.link(1)._sender is not None and job.groups[2]._links.link(0)._sender is None
    job.close()
