"""A channel without I/O: what goes out as records, what comes in as requests for bytes (channel.md, 5 and 6).

Blocking sockets, asyncio and the shared-memory ring drive the same two generators: ``outgoing`` yields each record
to send, ``incoming`` yields how many bytes must lie in the inbox before it can go on. So there is one place that
says what a record means.

    >>> from isolate.channel.session import Inbox
    >>> inbox = Inbox()
    >>> inbox.space(8)[:3] = b"abc"
    >>> inbox.added(3)
    >>> len(inbox)
    3
"""

from __future__ import annotations

import os
import struct
import sys
import weakref
from collections.abc import Iterator
from typing import Any

from isolate.channel.handshake import Session
from isolate.channel.record import HEADER_SIZE, PART_SIZE, SMALL, Kind
from isolate.crypto.aead import Suite, as_bytes
from isolate.crypto.secret import wipe
from isolate.errors import ChannelClosed, ChannelTruncated, RecordRefused, UsageError

MAX_MESSAGE = 2**30  # bytes that recv() allocates for one message at most; recv_into() has its buffer's length
_LENGTH = struct.Struct(">Q")


def flat(data: Any) -> memoryview:
    """A view in bytes of a buffer or a torch CPU tensor. Raises UsageError for anything else."""
    try:
        return as_bytes(data)
    except TypeError:
        pass
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.Tensor):
        if data.device.type != "cpu" or not data.is_contiguous():
            raise UsageError("a tensor must be contiguous and on the CPU")
        return as_bytes(data.detach().reshape(-1).view(torch.uint8).numpy())
    raise UsageError(f"a {type(data).__name__} has no bytes to send or to fill")


class Inbox:
    """Bytes that came in and are not yet opened, contiguous. Grows once, to the size of the largest record."""

    __slots__ = ("_buffer", "_end", "_start", "_view")

    def __init__(self) -> None:
        self._buffer = bytearray(SMALL)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    def __len__(self) -> int:
        return self._end - self._start

    def space(self, need: int) -> memoryview:
        """Where to put what comes next, so that ``need`` bytes lie here: that many, or up to SMALL for few."""
        missing = need - (self._end - self._start)
        room = max(missing, SMALL - (self._end - self._start))
        if self._start and self._end + room > len(self._buffer):
            left = self._end - self._start
            # Bytes that were read ahead; fewer than SMALL.
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
        if self._end + room > len(self._buffer):
            old = self._buffer[: self._end]
            self._view.release()
            self._buffer = bytearray(PART_SIZE + 2 * SMALL)
            self._buffer[: self._end] = old
            self._view = memoryview(self._buffer)
        return self._view[self._end : self._end + room]

    def added(self, count: int) -> None:
        self._end += count

    def peek(self, start: int, end: int) -> memoryview:
        return self._view[self._start + start : self._start + end]

    def drop(self, count: int) -> None:
        self._start += count
        if self._start == self._end:
            self._start = self._end = 0


class Endpoint:
    """One end of a channel after its handshake, without I/O. Not made by users: streams make it.

    ``peer`` is whom the handshake verified, ``binding`` (32 bytes) what invocations are bound to.
    """

    def __init__(self, session: Session, inbox: Inbox) -> None:
        self.peer = session.peer
        self.binding = session.binding
        self.suite: Suite = session.suite
        self._sealer, self._opener = session.sealer, session.opener
        self._inbox = inbox
        self._long: int | None = None
        self._over: str | None = None
        self._peer_closed = False
        self.forked = False
        _LIVE.add(self)

    # Ends.

    def end(self, why: str) -> None:
        """No byte goes in or out any more; the keys are gone. Saying why again changes nothing."""
        if self._over is None:
            self._over = why
            self._sealer.wipe()
            self._opener.wipe()

    @property
    def over(self) -> bool:
        return self._over is not None

    def check_open(self) -> None:
        if self._over is not None:
            raise ChannelClosed(f"this channel is over: {self._over}")

    def truncated(self) -> ChannelTruncated:
        """The transport ended: the error to raise. An end that was announced raises ChannelClosed elsewhere."""
        self.end("the transport ended without an authenticated close")
        return ChannelTruncated("the transport ended without an authenticated close")

    # Out.

    def outgoing(self, data: memoryview) -> Iterator[memoryview]:
        """Records for one message; each is to be sent whole before the next is asked for."""
        sealer, size = self._sealer, len(data)
        if size <= PART_SIZE:
            if sealer.due(size):
                yield sealer.rekey()
            yield sealer.seal(Kind.DATA, data)
            return
        yield sealer.seal(Kind.LONG, _LENGTH.pack(size))
        for start in range(0, size, PART_SIZE):
            if sealer.due(PART_SIZE):
                yield sealer.rekey()
            yield sealer.seal(Kind.PART, data[start : start + PART_SIZE])

    def closing(self) -> memoryview:
        return self._sealer.seal(Kind.CLOSE)

    # In.

    def incoming(self, target: memoryview | None, result: list[Any]) -> Iterator[int]:
        """Read one message into ``target`` (or a new bytearray), and append what it is: bytes read, or the array.

        Yields how many bytes must lie in the inbox. Raises ChannelClosed after the peer's close, RecordRefused and
        UsageError (``target`` is too small; the message is still there for another one).
        """
        inbox, opener = self._inbox, self._opener
        while True:
            if self._peer_closed:
                raise ChannelClosed("the peer closed the channel")
            if self._long is not None:
                yield from self._parts(target, result)
                return
            yield HEADER_SIZE
            header = bytes(inbox.peek(0, HEADER_SIZE))
            kind, size = opener.parse(header)
            if kind is Kind.DATA and target is not None and size > len(target):
                raise UsageError(f"the message has {size} bytes, the buffer {len(target)}")
            total = HEADER_SIZE + size + opener.tag_size
            yield total
            if kind is Kind.DATA:
                out: Any = bytearray(size) if target is None else target[:size]
                opener.open(header, inbox.peek(HEADER_SIZE, total), out)
                inbox.drop(total)
                result.append(out if target is None else size)
                return
            self._control(kind, header, size, inbox.peek(HEADER_SIZE, total))
            inbox.drop(total)

    def _control(self, kind: Kind, header: bytes, size: int, sealed: memoryview) -> None:
        if size != {Kind.LONG: _LENGTH.size, Kind.REKEY: 0, Kind.CLOSE: 0}.get(kind):
            raise RecordRefused("a record of this kind or length is out of place")
        body = bytearray(size)
        self._opener.open(header, sealed, body)
        if kind is Kind.CLOSE:
            self._peer_closed = True
        elif kind is Kind.LONG:
            (length,) = _LENGTH.unpack(body)
            if length <= PART_SIZE:
                raise RecordRefused("a long message is longer than one record")
            self._long = length

    def _parts(self, target: memoryview | None, result: list[Any]) -> Iterator[int]:
        length, inbox, opener = self._long or 0, self._inbox, self._opener
        if length > (MAX_MESSAGE if target is None else len(target)):
            limit = f"recv() takes {MAX_MESSAGE}" if target is None else f"the buffer has {len(target)}"
            raise UsageError(f"the message has {length} bytes, and {limit}")
        out = bytearray(length) if target is None else None
        view = memoryview(out) if out is not None else target[:length]  # type: ignore[index]
        done = 0
        try:
            while done < length:
                yield HEADER_SIZE
                header = bytes(inbox.peek(0, HEADER_SIZE))
                kind, size = opener.parse(header)
                if kind is not Kind.REKEY and (kind is not Kind.PART or size != min(PART_SIZE, length - done)):
                    raise RecordRefused("a part of a long message has another kind or length")
                total = HEADER_SIZE + size + opener.tag_size
                yield total
                if kind is Kind.REKEY:
                    self._control(kind, header, size, inbox.peek(HEADER_SIZE, total))
                else:
                    opener.open(header, inbox.peek(HEADER_SIZE, total), view[done : done + size])
                    done += size
                inbox.drop(total)
        finally:
            # A message comes whole or not at all, also when the reader stops waiting for the rest of it.
            if done < length:
                wipe(view)
                self.end("a message was cut off in its middle")
        self._long = None
        result.append(length if out is None else out)


_LIVE: weakref.WeakSet[Endpoint] = weakref.WeakSet()


def _poison_after_fork() -> None:
    """A child that went on with the same keys and counters would repeat nonces: its copies are dead."""
    for endpoint in list(_LIVE):
        endpoint.forked = True
        endpoint.end("the process forked, and the channel stays with the parent")


os.register_at_fork(after_in_child=_poison_after_fork)
