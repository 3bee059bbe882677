"""The collectives, over a Talk: rings for what is long, trees and direct exchange for what is short.

    >>> from isolate.torch.algorithms import cut
    >>> [len(one) for one in cut(memoryview(bytearray(40)), 3, item=4)]
    [16, 16, 8]

Buffers are flat views in bytes. In a ring each piece is sent on as soon as it was reduced
(docs/spec/process-group.md, 5). An element is reduced in the same order for
every rank, so that all get the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from isolate.torch.dtypes import Reduction
from isolate.torch.link import PIECE, count, pieces
from isolate.torch.talk import Talk

DIRECT = 1 << 16  # bytes up to which latency counts more than volume
SPAN = 2  # pieces of a part that go around a ring together: what may be sent before anything must have come
_FAR = 1 << 60  # a lag that never holds anything back: what is sent depends on nothing that comes


def cut(view: memoryview, parts: int, *, item: int) -> list[memoryview]:
    """Cut into ``parts`` of as many elements of ``item`` bytes; the last ones may be shorter or empty."""
    each = -(-(len(view) // item) // parts) * item
    return [view[index * each : (index + 1) * each] for index in range(parts)]


def sections(view: memoryview, parts: int) -> list[memoryview]:
    """Cut into what goes around a ring of so many parts at a time.

    >>> [len(one) for one in sections(memoryview(bytearray((1 << 21) + 8)), 2)]
    [2097152, 8]
    """
    each = SPAN * PIECE * parts
    return [view[start : start + each] for start in range(0, len(view), each)]


def all_reduce(talk: Talk, data: memoryview, reduction: Reduction) -> None:
    if talk.size == 1 or not len(data):
        return
    if len(data) <= DIRECT:
        _doubling(talk, data, reduction)
    else:
        _ring(talk, data, reduction)
    talk.flush()


def _doubling(talk: Talk, data: memoryview, reduction: Reduction) -> None:
    """Recursive doubling. Ranks beyond the largest power of two have a partner who takes part for them."""
    rank, size = talk.rank, talk.size
    core = 1 << (size.bit_length() - 1)
    other = memoryview(bytearray(len(data)))
    if rank >= core:
        talk.send(rank - core, data)
        talk.flush()
        talk.recv(rank - core, data)
        return
    if rank + core < size:
        talk.recv(rank + core, other)
        reduction.into(data, other)
    distance = 1
    while distance < core:
        peer = rank ^ distance
        talk.stream(peer, pieces(data), peer, pieces(other), lag=_FAR)
        # What is queued must be sealed before it changes.
        talk.flush()
        reduction.into(data, other)
        distance *= 2
    if reduction.finish is not None:
        reduction.finish(data)
    if rank + core < size:
        talk.send(rank + core, data)


def _ring(talk: Talk, data: memoryview, reduction: Reduction) -> None:
    """Reduce-scatter and all-gather as one stream of pieces around the ring, section by section of the tensor.

    So what was reduced goes on while it is still in a cache: 5 to 15 % of the time at 100 MiB (docs/adr/0018).
    """
    rank, size = talk.rank, talk.size
    scratch = memoryview(bytearray(min(PIECE, len(data))))
    out: list[memoryview] = []
    into: list[memoryview] = []
    kept: list[tuple[memoryview, bool] | None] = []
    for section in sections(data, size):
        lists = [pieces(part, SPAN) for part in cut(section, size, item=reduction.item)]
        for step in range(2 * (size - 1)):
            out += lists[(rank - step) % size]
            mine = lists[(rank - 1 - step) % size]
            if step < size - 1:
                into += [scratch[: len(piece)] for piece in mine]
                kept += [(piece, step == size - 2) for piece in mine]
            else:
                into += mine
                kept += [None] * SPAN

    def got(index: int) -> None:
        reduced = kept[index]
        if reduced is None or not len(reduced[0]):
            return
        reduction.into(reduced[0], into[index])
        if reduced[1] and reduction.finish is not None:
            reduction.finish(reduced[0])

    talk.stream((rank + 1) % size, out, (rank - 1) % size, into, lag=SPAN, got=got)


def reduce_scatter(talk: Talk, blocks: Sequence[memoryview], out: memoryview, reduction: Reduction) -> None:
    """``blocks[k]`` are reduced to rank k, where they have the size of its ``out``. ``blocks`` stay as they are."""
    rank, size = talk.rank, talk.size
    if size == 1:
        out[:] = blocks[0]
        return
    each = max(count(len(block)) for block in blocks)
    lists = [pieces(block, each) for block in blocks]
    longest = max(len(block) for block in blocks)
    # What came and was reduced is sent on from here. A sender of its own may be behind by a whole part.
    rounds = 1 if talk.inline else max(size - 2, 1)
    work = [pieces(memoryview(bytearray(longest)), each) for _ in range(rounds)] if size > 2 else []
    scratch = memoryview(bytearray(min(PIECE, longest)))
    send = list(lists[(rank - 1) % size])
    into: list[memoryview] = []
    mine: list[memoryview] = []
    final = pieces(out, each)
    for step in range(size - 1):
        block = lists[(rank - 2 - step) % size]
        mine += block
        if step < size - 2:
            held = [room[: len(piece)] for room, piece in zip(work[step % rounds], block, strict=True)]
            into += held
            send += held
        else:
            # ``out`` may be the same memory as our own block.
            into += [scratch[: len(piece)] for piece in block]
    last = (size - 2) * each

    def got(index: int) -> None:
        if not len(mine[index]):
            return
        if index < last:
            reduction.into(into[index], mine[index])
            return
        reduction.both(final[index - last], into[index], mine[index])
        if reduction.finish is not None:
            reduction.finish(final[index - last])

    talk.stream((rank + 1) % size, send, (rank - 1) % size, into, lag=each, got=got)
    talk.flush()


def all_gather(talk: Talk, blocks: Sequence[memoryview]) -> None:
    """``blocks[rank]`` is there already; the others come."""
    rank, size = talk.rank, talk.size
    if size == 1:
        return
    if max(len(block) for block in blocks) <= DIRECT // 2:
        for step in range(1, size):
            talk.send((rank + step) % size, blocks[rank])
        for step in range(1, size):
            talk.recv((rank - step) % size, blocks[(rank - step) % size])
    else:
        each = max(count(len(block)) for block in blocks)
        lists = [pieces(block, each) for block in blocks]
        out = [piece for step in range(size - 1) for piece in lists[(rank - step) % size]]
        into = [piece for step in range(size - 1) for piece in lists[(rank - 1 - step) % size]]
        talk.stream((rank + 1) % size, out, (rank - 1) % size, into, lag=each)
    talk.flush()


def broadcast(talk: Talk, data: memoryview, root: int) -> None:
    rank, size = talk.rank, talk.size
    if size == 1 or not len(data):
        return
    place = (rank - root) % size
    if len(data) <= DIRECT:
        # A binomial tree: whoever has it gives it to the rank at twice the distance.
        reach = 1
        while reach < size:
            if place < reach and place + reach < size:
                talk.send((rank + reach) % size, data)
            elif reach <= place < 2 * reach:
                talk.recv((rank - reach) % size, data)
            reach *= 2
    else:
        cut_up = pieces(data)
        source = None if place == 0 else (rank - 1) % size
        to = None if place == size - 1 else (rank + 1) % size
        talk.stream(to, cut_up, source, cut_up, lag=0)
    talk.flush()


def reduce(talk: Talk, data: memoryview, root: int, reduction: Reduction) -> None:
    """To the root, where ``data`` is replaced; elsewhere it stays as it was."""
    rank, size = talk.rank, talk.size
    if size == 1 or not len(data):
        return
    place = (rank - root) % size
    if place == size - 1:
        talk.stream((rank - 1) % size, pieces(data), None, (), lag=0)
        talk.flush()
        return
    cut_up = pieces(data)
    if place == 0:
        scratch = memoryview(bytearray(min(PIECE, len(data))))
        into = [scratch[: len(piece)] for piece in cut_up]
        to = None
    else:
        into, to = pieces(memoryview(bytearray(len(data)))), (rank - 1) % size

    def got(index: int) -> None:
        if place:
            reduction.into(into[index], cut_up[index])
            return
        reduction.into(cut_up[index], into[index])
        if reduction.finish is not None:
            reduction.finish(cut_up[index])

    talk.stream(to, into, (rank + 1) % size, into, lag=0, got=got)
    talk.flush()


def gather(talk: Talk, mine: memoryview, blocks: Sequence[memoryview], root: int) -> None:
    """``blocks``, at the root only: one for each rank."""
    if talk.rank != root:
        talk.stream(root, pieces(mine), None, (), lag=0)
        talk.flush()
        return
    blocks[root][:] = mine
    for step in range(1, talk.size):
        source = (root + step) % talk.size
        talk.stream(None, (), source, pieces(blocks[source]), lag=0)


def scatter(talk: Talk, blocks: Sequence[memoryview], mine: memoryview, root: int) -> None:
    """``blocks``, at the root only: one for each rank."""
    if talk.rank != root:
        talk.stream(None, (), root, pieces(mine), lag=0)
        return
    mine[:] = blocks[root]
    for step in range(1, talk.size):
        to = (root + step) % talk.size
        talk.stream(to, pieces(blocks[to]), None, (), lag=0)
    talk.flush()


def all_to_all(talk: Talk, send: Sequence[memoryview], recv: Sequence[memoryview]) -> None:
    rank, size = talk.rank, talk.size
    recv[rank][:] = send[rank]
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        talk.stream(to, pieces(send[to]), source, pieces(recv[source]), lag=_FAR)
    talk.flush()


def barrier(talk: Talk) -> None:
    """Dissemination: after round k everybody knows that 2^k ranks are there."""
    nothing = memoryview(bytearray())
    distance = 1
    while distance < talk.size:
        talk.send((talk.rank + distance) % talk.size, nothing)
        talk.recv((talk.rank - distance) % talk.size, nothing)
        distance *= 2
    talk.flush()
