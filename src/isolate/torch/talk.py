"""What one collective says on its links: a header first, so that ranks in different collectives notice, then bytes.

    >>> from isolate.torch.talk import Head, Operation
    >>> head = Head(Operation.ALL_REDUCE, number=7, reduction=1, dtype=1, size=4096)
    >>> len(head.encode()), Head.parse(head.encode()) == head
    (20, True)

docs/spec/process-group.md, 4.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Self

from attrs import frozen

from isolate.errors import MalformedError, RankFailed
from isolate.torch.link import AHEAD, MAX_FIRST, Link
from isolate.torch.links import Links

HEAD = struct.Struct(">BBBxIIQ")
LONG = 1 << 22  # bytes from which a thread of its own is worth its start, where there is a core for it
SMALL = MAX_FIRST - HEAD.size  # bytes that travel in the message of their header


class Operation(IntEnum):
    """The first byte of a header."""

    ALL_REDUCE = 1
    BROADCAST = 2
    ALL_GATHER = 3
    REDUCE_SCATTER = 4
    ALL_TO_ALL = 5
    REDUCE = 6
    GATHER = 7
    SCATTER = 8
    BARRIER = 9
    MONITORED_BARRIER = 10


@frozen
class Head:
    """What both ends of a link must agree on. ``size`` is in bytes, 0 where the ranks need not know the others'."""

    operation: Operation
    number: int  # of this collective in its group, modulo 2^32
    reduction: int = 0
    dtype: int = 0
    root: int = 0
    size: int = 0

    def encode(self) -> bytes:
        return HEAD.pack(self.operation, self.reduction, self.dtype, self.root, self.number & 0xFFFFFFFF, self.size)

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Raises MalformedError."""
        try:
            operation, reduction, dtype, root, number, size = HEAD.unpack(raw)
            return cls(Operation(operation), number, reduction, dtype, root, size)
        except (struct.error, ValueError):
            raise MalformedError("no header of a collective") from None

    def __str__(self) -> str:
        name = self.operation.name.lower()
        what = f"reduction {self.reduction}, dtype {self.dtype}, root {self.root}, {self.size} bytes"
        return f"{name} number {self.number} ({what})"


class Talk:
    """One collective of one rank. Everything raises RankFailed."""

    def __init__(self, links: Links, head: Head) -> None:
        self.links, self.rank, self.size = links, links.rank, links.size
        self._head, self._raw = head, head.encode()
        # Only to be known by this rank: the bytes are the same.
        self.queued = links.spare and head.size >= LONG
        self._told: set[int] = set()
        self._heard: set[int] = set()
        self._link: dict[int, Link] = {}

    def link(self, peer: int) -> Link:
        link = self._link.get(peer)
        if link is None:
            link = self._link[peer] = self.links.link(peer)
        return link

    @property
    def inline(self) -> bool:
        """Whether a buffer was sealed when ``send`` answers, on every link."""
        return not self.queued and all(
            self.links.link(peer).inline for peer in range(self.size) if peer != self.rank
        )

    def send(self, peer: int, data: memoryview) -> None:
        link = self.link(peer)
        if peer not in self._told:
            self._told.add(peer)
            if len(data) <= SMALL:
                link.send(memoryview(self._raw + bytes(data)), queued=self.queued)
                return
            link.send(memoryview(self._raw), queued=self.queued)
        self.links.waiting = peer
        link.send(data, queued=self.queued)

    def recv(self, peer: int, into: memoryview) -> None:
        link = self.link(peer)
        self.links.waiting = peer
        if peer not in self._heard:
            self._heard.add(peer)
            if self._first(link, peer, into):
                self.links.moved = time.monotonic()
                return
        link.recv(into)
        self.links.moved = time.monotonic()

    def _first(self, link: Link, peer: int, into: memoryview) -> bool:
        """The message with the header; answers whether ``into`` came with it. Another header than ours is told."""
        joined = len(into) <= SMALL
        got, first = link.first(link.scratch), link.scratch
        if first[: HEAD.size] == self._raw and got == HEAD.size + (len(into) if joined else 0):
            if joined:
                into[:] = first[HEAD.size : got]
            return joined
        rank, ours = self.links.ranks[peer], self._head
        try:
            theirs: object = Head.parse(bytes(first[: min(max(got, 0), HEAD.size)]))
        except MalformedError:
            theirs = "something else"
        why = f"rank {rank} failed: it is in {theirs}, this rank in {ours}"
        raise self.links.fail(RankFailed(why, rank=rank, code="collective_mismatch"))

    def flush(self) -> None:
        """Wait until every buffer was sent."""
        for link in self._link.values():
            link.flush()

    def stream(
        self,
        to: int | None,
        out: Sequence[memoryview],
        source: int | None,
        into: Sequence[memoryview],
        *,
        lag: int,
        got: Callable[[int], None] | None = None,
    ) -> None:
        """Send pieces to one rank while others come from another; ``got(k)`` is called when piece k has come.

        Piece q may be sent once piece q - ``lag`` has come and was dealt with. No rank sends more than a few pieces
        before it has got one, so that all of a ring may send before they read (docs/spec/process-group.md, 5).
        """
        sent, total = 0, len(out) if to is not None else 0
        ahead = AHEAD[self.link(to).inline and not self.queued] if to is not None else 0
        for index in range(len(into) if source is not None else 0):
            while sent < total and sent < index + ahead and sent < index + lag:
                self._put(to, out[sent])
                sent += 1
            if len(into[index]) and source is not None:
                self.recv(source, into[index])
            if got is not None:
                got(index)
        while sent < total:
            self._put(to, out[sent])
            sent += 1

    def _put(self, to: int | None, data: memoryview) -> None:
        if len(data) and to is not None:
            self.send(to, data)
