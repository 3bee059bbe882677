"""A channel without I/O: what goes out as records, and what the bytes that came in mean (channel.md, 5 to 7).

Blocking sockets, asyncio and the shared-memory ring all drive one Endpoint: ``outgoing`` yields the records of a
message, ``pull`` says how many bytes must lie in the inbox before it can go on. So there is one place that says
what a record means.

    >>> from isolate.channel.session import Inbox
    >>> inbox = Inbox()
    >>> inbox.space(8)[:3] = b"abc"
    >>> inbox.added(3)
    >>> len(inbox)
    3
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from isolate.channel.handshake import Session
from isolate.channel.peers import AttestedPeer, HolderPeer
from isolate.channel.record import HEADER_SIZE, PART_SIZE, SMALL, Kind
from isolate.crypto.aead import Pin, Suite, as_bytes
from isolate.crypto.secret import wipe
from isolate.errors import ChannelClosed, ChannelTruncated, RecordRefused, UsageError

MAX_MESSAGE = 2**30  # bytes that recv() allocates for one message at most; recv_into() has its buffer's length
MAX_CODE = 64
MAX_ATTEST = 128 * 1024
_LENGTH = struct.Struct(">Q")
_DATA = int(Kind.DATA)


def flat(data: Any) -> memoryview:
    """A view in bytes of a buffer or a torch CPU tensor. Raises UsageError for anything else."""
    try:
        view = data if type(data) is memoryview else memoryview(data)
    except (TypeError, ValueError):
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(data, torch.Tensor):
            raise UsageError(f"a {type(data).__name__} gives no buffer of bytes") from None
        try:
            # Sparse, nested and conjugated ones raise in one of these.
            if data.device.type == "cpu" and data.is_contiguous():
                return as_bytes(data.detach().reshape(-1).view(torch.uint8).numpy())
        except RuntimeError:
            pass
        raise UsageError("a tensor must be dense, contiguous and on the CPU") from None
    return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else as_bytes(view)


class Inbox:
    """Bytes that came in and are not yet opened, contiguous. Grows once, to the size of the largest record."""

    __slots__ = ("end", "first", "pin", "start")

    def __init__(self) -> None:
        self.pin = Pin(2 * SMALL)
        self.first = self.pin.view[:SMALL]  # where reading begins, when nothing is there and little is needed
        self.start = self.end = 0

    def __len__(self) -> int:
        return self.end - self.start

    def space(self, need: int) -> memoryview:
        """Where to put what comes next, so that ``need`` bytes lie here: what is missing, or up to SMALL."""
        have = self.end - self.start
        room = (need if need > SMALL else SMALL) - have
        if self.end + room > self.pin.size:
            pin = self.pin if have + room <= self.pin.size else Pin(PART_SIZE + 2 * SMALL)
            # What was read ahead, at most SMALL bytes.
            pin.view[:have] = self.pin.view[self.start : self.end]
            self.pin, self.first, self.start, self.end = pin, pin.view[:SMALL], 0, have
        return self.pin.view[self.end : self.end + room]

    def added(self, count: int) -> None:
        self.end += count

    def take(self, count: int) -> bytes:
        """The first ``count`` bytes, for small things."""
        taken = bytes(self.pin.view[self.start : self.start + count])
        self.drop(count)
        return taken

    def drop(self, count: int) -> None:
        self.start += count
        if self.start == self.end:
            self.start = self.end = 0


class Endpoint:
    """One end of a channel after its handshake, without I/O. A transport drives it; users hold a Channel.

    ``message`` is what ``pull`` completed: bytes read into the caller's buffer, or a new bytearray. ``leave``
    closes a forked child's copy of the transport.
    """

    def __init__(self, session: Session, inbox: Inbox, leave: Callable[[], None] = lambda: None) -> None:
        self.binding = session.binding
        self.suite: Suite = session.suite
        self.standing = session.standing
        self._sealer, self._opener, self._inbox = session.sealer, session.opener, inbox
        # Whoever uses a key holds its lock, so that it is not wiped in the middle: see end() and tidy().
        self.sending, self.receiving = threading.Lock(), threading.Lock()
        self.message: int | bytearray = 0
        self._long: int | None = None
        self._view: memoryview | None = None
        self._whole: bytearray | None = None
        self._done = 0
        self._waiting: bytearray | None = None
        self.over = False
        self._why = ""
        self._closed_by_peer: str | None = None
        self.forked = False
        self._leave = leave
        _LIVE.add(self)

    @property
    def peer(self) -> AttestedPeer | HolderPeer:
        return self.standing.peer

    @property
    def midway(self) -> bool:
        """Whether a record or a long message has come in part."""
        return self._view is not None or len(self._inbox) > 0

    @property
    def within_long(self) -> bool:
        """Whether a message of several records has come in part."""
        return self._view is not None

    def end(self, why: str) -> None:
        """No byte goes in or out any more; keys, and a message that came in part, are wiped."""
        if not self.over:
            self._why, self.over = why, True
        self.tidy()

    def tidy(self) -> None:
        """Wipe what nobody is using. A thread that holds one of the locks calls this again when it lets go."""
        if self.sending.acquire(blocking=False):
            self._sealer.wipe()
            self.sending.release()
        if self.receiving.acquire(blocking=False):
            self._opener.wipe()
            if self._view is not None:
                wipe(self._view)
                self._view = None
            self._waiting = None
            self.receiving.release()

    def after_fork(self) -> None:
        """In the child: its copies of keys and counters would repeat nonces. Locks may be held by nobody there."""
        self.forked = True
        self.sending, self.receiving = threading.Lock(), threading.Lock()
        self.end("the process forked, and the channel stays with the parent")
        # Else the peer would not see the end of the transport when the parent dies and the child does not.
        with contextlib.suppress(OSError):
            self._leave()

    def check_open(self) -> None:
        if self.over:
            raise ChannelClosed(f"this channel is over: {self._why}")

    def truncated(self) -> ChannelTruncated:
        """The transport ended, and nobody had said so: the error to raise."""
        self.end("the transport ended without an authenticated close")
        return ChannelTruncated("the transport ended without an authenticated close")

    # Out. Each record is to be sent whole before the next one is made.

    def _seal(self, kind: Kind, data: memoryview) -> memoryview:
        self.check_open()
        return self._sealer.seal(kind, data)

    def _rekey(self) -> memoryview:
        self.check_open()
        return self._sealer.rekey()

    def single(self, data: memoryview) -> memoryview | None:
        """The one record of a message when one is all that it takes; None when there is anything else to do."""
        size, sealer, standing = len(data), self._sealer, self.standing
        if self.over or size > PART_SIZE or size > sealer.bytes_left or sealer.records_left <= 1:
            return None
        now = standing.clock()
        return sealer.seal(_DATA, data) if now < standing.due and now < sealer.until else None

    def outgoing(self, data: memoryview) -> Iterator[memoryview]:
        """The records of any message."""
        size = len(data)
        if size > PART_SIZE:
            if self._sealer.due(_LENGTH.size):
                yield self._rekey()
            yield self._seal(Kind.LONG, memoryview(_LENGTH.pack(size)))
        for start in range(0, max(size, 1), PART_SIZE):
            part = data[start : start + PART_SIZE]
            if self._sealer.due(len(part)):
                yield self._rekey()
            yield self._seal(Kind.PART if size > PART_SIZE else Kind.DATA, part)

    def closing(self, code: str = "") -> memoryview:
        return self._seal(Kind.CLOSE, memoryview(code.encode("ascii", "replace")[:MAX_CODE]))

    def attesting(self, *, now: bool = False) -> memoryview | None:
        """An ATTEST record, when there is a newer token to show."""
        body = self.standing.again(self._sealer.sequence, now=now)
        return None if body is None else self._seal(Kind.ATTEST, memoryview(body))

    # In.

    def pull(self, target: memoryview | None) -> int:
        """Go on with one message into ``target`` (or a new bytearray, for None).

        Answers how many bytes must lie in the inbox, or 0 when ``message`` is complete. Raises RecordRefused,
        HandshakeRefused (a refused ATTEST), ChannelClosed (the peer closed) and UsageError (``target`` is too
        small; the message is still there for another one).
        """
        inbox, opener = self._inbox, self._opener
        while True:
            if self._closed_by_peer is not None:
                why = f": {self._closed_by_peer}" if self._closed_by_peer else ""
                raise ChannelClosed(f"the peer closed the channel{why}")
            if self._waiting is not None:
                return self._hand_over(target)
            if self._long is not None and self._view is None:
                self._begin_long(self._long, target)
            have = inbox.end - inbox.start
            if have < HEADER_SIZE:
                return HEADER_SIZE
            kind, size = opener.parse(inbox.pin.raw, inbox.start)
            total = size + opener.overhead
            if kind is Kind.DATA and self._view is None:
                if have < total:
                    return total
                if target is None or size > len(target):
                    # Also when it is too long for the buffer: only what is authentic may blame the caller.
                    self._waiting = bytearray(size)
                    self._open(kind, memoryview(self._waiting))
                    inbox.drop(total)
                    return self._hand_over(target)
                self.message = size
                if self.over:
                    self.check_open()
                opener.open(inbox.pin, inbox.start, kind, target if len(target) == size else target[:size])
                inbox.drop(total)
                return 0
            self._check_place(kind, size)
            if have < total:
                return total
            if kind is Kind.PART:
                view: Any = self._view
                self._open(kind, view[self._done : self._done + size])
                self._done += size
            else:
                self._control(kind, size)
            inbox.drop(total)
            if self._view is not None and self._done == len(self._view):
                self.message = self._done if self._whole is None else self._whole
                self._long = self._view = self._whole = None
                return 0

    def _hand_over(self, target: memoryview | None) -> int:
        """Give out the message that was opened already."""
        waiting = self._waiting or bytearray()
        if target is None:
            self.message = waiting
        elif len(waiting) > len(target):
            raise UsageError(f"the message has {len(waiting)} bytes, the buffer {len(target)}")
        else:
            self.message = len(waiting)
            target[: len(waiting)] = waiting
        self._waiting = None
        return 0

    def _open(self, kind: Kind, out: memoryview) -> None:
        if self.over:
            self.check_open()
        self._opener.open(self._inbox.pin, self._inbox.start, kind, out)

    def _check_place(self, kind: Kind, size: int) -> None:
        """Which kinds may come where, and how long they are: checked before their bytes are waited for."""
        if self._view is not None:
            left = len(self._view) - self._done
            allowed = (kind is Kind.PART and size == min(PART_SIZE, left)) or (kind is Kind.REKEY and size == 0)
        elif kind is Kind.LONG:
            allowed = size == _LENGTH.size
        elif kind is Kind.ATTEST:
            allowed = size <= MAX_ATTEST
        else:
            allowed = (kind is Kind.CLOSE and size <= MAX_CODE) or (kind is Kind.REKEY and size == 0)
        if not allowed:
            raise RecordRefused("a record of this kind or length is out of place")

    def _control(self, kind: Kind, size: int) -> None:
        body, number = bytearray(size), self._opener.sequence
        self._open(kind, memoryview(body))
        if kind is Kind.CLOSE:
            code = body.decode("ascii", "replace")
            self._closed_by_peer = code if re.fullmatch(r"[a-z_]*", code) else "no reason"
        elif kind is Kind.ATTEST:
            self.standing.renew(bytes(body), number)
        elif kind is Kind.LONG:
            (self._long,) = _LENGTH.unpack(body)
            if self._long <= PART_SIZE:
                raise RecordRefused("a long message is longer than one record")

    def _begin_long(self, length: int, target: memoryview | None) -> None:
        if length > (MAX_MESSAGE if target is None else len(target)):
            limit = f"recv() takes {MAX_MESSAGE}" if target is None else f"the buffer has {len(target)}"
            raise UsageError(f"the message has {length} bytes, and {limit}")
        self._whole = bytearray(length) if target is None else None
        self._view = memoryview(self._whole) if self._whole is not None else target[:length]  # type: ignore[index]
        self._done = 0


_LIVE: weakref.WeakSet[Endpoint] = weakref.WeakSet()


def _poison_after_fork() -> None:
    for endpoint in list(_LIVE):
        endpoint.after_fork()


os.register_at_fork(after_in_child=_poison_after_fork)
