"""Messages from one rank to another, beside the collectives: send, recv, tags, and from any source.

    >>> from isolate.torch.points import POINT
    >>> POINT.unpack(POINT.pack(7, 4096))
    (7, 4096)

A channel for each direction, opened by the first that is sent (docs/spec/process-group.md, 6). A thread reads what
comes and finds the receive that was posted for it. What nobody has asked for yet is kept, up to a limit; beyond it
the sender waits. Messages of one sender with one tag come in their order.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from attrs import define

from isolate.channel import Channel
from isolate.errors import ChannelClosed, ChannelTimeout, ChannelTruncated, IsolateError, RankFailed, UsageError
from isolate.torch.link import give_up
from isolate.torch.links import Links

POINT = struct.Struct(">qQ")  # tag, bytes
JOINED = 1 << 15  # bytes that travel in the message of their header
KEPT = 1 << 26  # bytes of one sender that nobody asked for yet
_MAX = 1 << 30  # bytes of one message that nobody asked for yet

Done = Callable[[int, BaseException | None], None]


@define(eq=False)
class _Posted:
    """A receive that waits. ``source`` None is any."""

    source: int | None
    tag: int
    into: memoryview
    done: Done
    deadline: float


@define(eq=False)
class _Sending:
    to: int
    tag: int
    data: memoryview
    done: Done
    deadline: float


class Points:
    """The point-to-point messages of one group. Indices are ranks in the group."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._changed = threading.Condition()
        self._posted: list[_Posted] = []
        self._kept: dict[int, deque[tuple[int, bytearray]]] = {}
        self._senders: dict[int, SimpleQueue[_Sending | None]] = {}
        self._sending: list[_Sending] = []
        self._channels: list[Channel] = []
        self._gone: set[int] = set()
        links.watched.append(self._look)
        links.attach(self._admit, self._end)

    def send(self, to: int, tag: int, data: memoryview, timeout: float, done: Done) -> None:
        """``done`` is called when the buffer was sealed and is on its way, or with the error."""
        message = _Sending(to, tag, data, done, time.monotonic() + timeout)
        with self._changed:
            if self._links.over:
                queue = None
            else:
                self._sending.append(message)
                queue = self._senders.get(to)
                if queue is None:
                    queue = self._senders[to] = SimpleQueue()
                    threading.Thread(
                        target=self._send_all, args=(to, queue), name="isolate-send", daemon=True
                    ).start()
                queue.put(message)
        if queue is None:
            done(to, self._error())

    def recv(self, source: int | None, tag: int, into: memoryview, timeout: float, done: Done) -> None:
        """``done`` is called with the sender when the message is in ``into``, or with the error."""
        posted = _Posted(source, tag, into, done, time.monotonic() + timeout)
        with self._changed:
            if not self._links.over:
                found = self._find(posted)
                if found is None and source is not None and source in self._gone:
                    found = source, None
                if found is None:
                    self._posted.append(posted)
                    self._changed.notify_all()
                    return
            else:
                found = None
        if found is None:
            done(-1, self._error())
        elif found[1] is None:
            done(found[0], self._links.broken(found[0], ChannelTruncated("it is gone")))
        else:
            self._deliver(posted, found[0], found[1])

    def _error(self) -> BaseException:
        try:
            self._links.check()
        except RankFailed as error:
            return error
        return RankFailed("the process group ended", code="group_over")

    def _find(self, posted: _Posted) -> tuple[int, bytearray | None] | None:
        """A kept message for this receive. The caller holds the lock."""
        for source, kept in self._kept.items():
            if posted.source in (None, source):
                for place, (tag, message) in enumerate(kept):
                    if tag == posted.tag:
                        del kept[place]
                        self._changed.notify_all()
                        return source, message
        return None

    def _deliver(self, posted: _Posted, source: int, message: bytearray) -> None:
        if len(message) != len(posted.into):
            posted.done(source, self._misfit(source, len(message), len(posted.into)))
            return
        posted.into[:] = message
        posted.done(source, None)

    def _misfit(self, source: int, came: int, asked: int) -> UsageError:
        return UsageError(f"rank {self._links.ranks[source]} sent {came} bytes, and the tensor has {asked}")

    def _send_all(self, to: int, queue: SimpleQueue[_Sending | None]) -> None:
        channel: Channel | None = None
        while (message := queue.get()) is not None:
            error: BaseException | None = None
            try:
                self._links.check()
                if channel is None:
                    channel = self._links.open_point(to)
                    with self._changed:
                        self._channels.append(channel)
                head, data = POINT.pack(message.tag, len(message.data)), message.data
                if len(data) <= JOINED:
                    channel.send(head + bytes(data))
                else:
                    channel.send(head)
                    channel.send(data)
            except IsolateError as caught:
                error = self._links.broken(to, caught)
            with self._changed:
                done = message in self._sending
                if done:
                    self._sending.remove(message)
            if done:
                message.done(to, error)
            del message

    def _admit(self, index: int, channel: Channel) -> None:
        with self._changed:
            self._channels.append(channel)
        threading.Thread(target=self._read, args=(index, channel), name="isolate-recv", daemon=True).start()

    def _read(self, source: int, channel: Channel) -> None:
        buffer = memoryview(bytearray(POINT.size + JOINED))
        try:
            while True:
                got = self._patiently(channel, buffer)
                if got < POINT.size:
                    raise UsageError("it sends a message without a header")
                tag, size = POINT.unpack(buffer[: POINT.size])
                body = buffer[POINT.size : got] if size <= JOINED else None
                if (body is not None and len(body) != size) or (body is None and got != POINT.size):
                    raise UsageError("it sends another size than it says")
                self._take(source, channel, tag, size, body)
        except (ChannelTruncated, ChannelClosed):
            self._ended(source)
        except IsolateError as error:
            if not self._links.over:
                self._links.broken(source, error)

    def _patiently(self, channel: Channel, into: memoryview) -> int:
        while True:
            try:
                return channel.recv_into(into)
            except ChannelTimeout:
                self._links.check()

    def _take(self, source: int, channel: Channel, tag: int, size: int, body: memoryview | None) -> None:
        """Give one message to the receive that waits for it, or keep it."""
        with self._changed:
            posted = None
            while not self._links.over:
                posted = self._match(source, tag)
                kept = sum(len(message) for _, message in self._kept.get(source, ()))
                # A receive of another tag waits behind this message: it has to get out of the way.
                blocked = any(one.source in (None, source) for one in self._posted)
                if posted is not None or kept + size <= KEPT or (blocked and size <= _MAX):
                    break
                self._changed.wait()
            self._links.check()
        if body is None:
            whole = size == (len(posted.into) if posted else -1)
            target: memoryview | bytearray = posted.into if posted and whole else bytearray(size)
            try:
                count = self._patiently(channel, memoryview(target))
                if count != size:
                    raise UsageError("it sends another size than it says")
            except IsolateError as error:
                if posted is not None:
                    posted.done(source, self._links.broken(source, error))
                raise
            if posted is not None and whole:
                posted.done(source, None)
                return
        else:
            target = bytearray(body)
        if posted is not None:
            self._deliver(posted, source, bytearray(target))
            return
        self._keep(source, tag, bytearray(target))

    def _keep(self, source: int, tag: int, message: bytearray) -> None:
        """Keep a message; or hand it over, when a receive was posted while it came."""
        with self._changed:
            posted = self._match(source, tag)
            if posted is None:
                self._kept.setdefault(source, deque()).append((tag, message))
        if posted is not None:
            self._deliver(posted, source, message)

    def _match(self, source: int, tag: int) -> _Posted | None:
        """The first receive that takes this message. The caller holds the lock."""
        for one in self._posted:
            if one.tag == tag and one.source in (None, source):
                self._posted.remove(one)
                return one
        return None

    def _ended(self, source: int) -> None:
        """This sender is gone: who waits for it, and for nobody else, waits in vain."""
        with self._changed:
            self._gone.add(source)
            waiting = any(one.source == source for one in self._posted)
        if waiting:
            self._links.broken(source, ChannelTruncated("it is gone"))

    def _look(self, now: float) -> tuple[str, int | None] | None:
        """What is late: for the watch of the links."""
        with self._changed:
            for sending in self._sending:
                if now > sending.deadline:
                    return "a send", sending.to
            for posted in self._posted:
                if now > posted.deadline:
                    return "a receive", posted.source
        return None

    def _end(self) -> None:
        """The group is over: whoever waits gets the error."""
        with self._changed:
            channels, self._channels = self._channels, []
            posted, self._posted = self._posted, []
            sending, self._sending = self._sending, []
            queues, self._senders = list(self._senders.values()), {}
            self._kept.clear()
            self._changed.notify_all()
        for channel in channels:
            give_up(channel)
        for queue in queues:
            queue.put(None)
        for receive in posted:
            receive.done(-1, self._error())
        for send in sending:
            send.done(send.to, self._error())
