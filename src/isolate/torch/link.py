"""One link: whole buffers to and from one rank, in order.

    >>> from isolate.torch.link import PIECE, pieces
    >>> [len(one) for one in pieces(memoryview(bytearray(PIECE + 5)), 3)]
    [524288, 5, 0]

A ring in shared memory takes a few pieces without anybody reading, so the thread that works on a collective can
send by itself, which is the fastest where each rank has a core or two. A socket may take none: there a thread
sends, or two ranks that send at once would wait for ever. With more cores one sends what is long on a ring too.
"""

from __future__ import annotations

import contextlib
import threading
from queue import Queue
from typing import TYPE_CHECKING

from isolate.channel import Channel
from isolate.errors import ChannelTimeout, IsolateError, UsageError

if TYPE_CHECKING:
    from isolate.torch.links import Links

PIECE = 1 << 19  # bytes of one record: large enough to be cheap, small enough to stay in a cache
AHEAD = {True: 2, False: 8}  # pieces sent before one must have come, by whether the caller's own thread sends
MAX_FIRST = 20 + (1 << 15)  # bytes of a message that begins with a header
_ENOUGH = 16  # pieces that wait for the sender


def pieces(view: memoryview, count: int = 0) -> list[memoryview]:
    """Cut into pieces; empty ones fill up to ``count``."""
    cut = [view[start : start + PIECE] for start in range(0, len(view), PIECE)]
    return cut + [view[:0]] * (count - len(cut))


def count(size: int) -> int:
    """How many pieces ``size`` bytes are."""
    return -(-size // PIECE)


def give_up(channel: Channel) -> None:
    """End a channel at once, without a word to the peer and without waiting for anything."""
    channel.abort("its process group ended")


class Link:
    """``send`` answers when the buffer was sealed, or was queued: ``flush`` waits for that."""

    def __init__(self, links: Links, index: int, channel: Channel, *, ring: bool) -> None:
        self._links, self._index, self.channel = links, index, channel
        self.inline = ring
        # For messages that begin with a header, whatever they turn out to be.
        self.scratch = memoryview(bytearray(MAX_FIRST))
        self._queue: Queue[memoryview | None] = Queue(_ENOUGH)
        self._over = False
        self._idle = threading.Condition()
        self._queued = 0
        self._sender: threading.Thread | None = None

    def send(self, data: memoryview, *, queued: bool = False) -> None:
        """``queued``: by the thread, though this is a ring. One collective does the one or the other, then flushes.

        Raises RankFailed.
        """
        if queued or not self.inline:
            self._links.check()
            if self._sender is None:
                self._sender = threading.Thread(target=self._work, name="isolate-send", daemon=True)
                self._sender.start()
            with self._idle:
                self._queued += 1
            self._queue.put(data)
            return
        try:
            self.channel.send(data)
        except IsolateError as error:
            raise self._links.broken(self._index, error) from None

    def recv(self, into: memoryview) -> None:
        """The next message, which has exactly ``len(into)`` bytes. Raises RankFailed."""
        if self.first(into) != len(into):
            raise self._links.broken(self._index, UsageError("it sends another size than was meant"))

    def first(self, into: memoryview) -> int:
        """The next message, and its size; -1 for one that is longer than ``into``. Raises RankFailed."""
        while True:
            try:
                return self.channel.recv_into(into)
            except ChannelTimeout:
                # Nothing came yet. How long a collective may take is watched elsewhere.
                self._links.check()
            except UsageError:
                return -1
            except IsolateError as error:
                raise self._links.broken(self._index, error) from None

    def flush(self) -> None:
        """Wait until everything was sent: only then may the buffers change. Raises RankFailed."""
        if self._queued:
            with self._idle:
                self._idle.wait_for(lambda: not self._queued or self._over)
            self._links.check()

    def _work(self) -> None:
        while (data := self._queue.get()) is not None:
            try:
                if not self._over:
                    self.channel.send(data)
            except IsolateError as error:
                self._links.broken(self._index, error)
                self._over = True
            del data
            with self._idle:
                self._queued -= 1
                if not self._queued or self._over:
                    self._idle.notify_all()

    def give_up(self) -> None:
        self._over = True
        give_up(self.channel)
        self._end()

    def close(self) -> None:
        """Send what is queued, and say goodbye."""
        with self._idle:
            self._idle.wait_for(lambda: not self._queued or self._over, 5.0)
        with contextlib.suppress(IsolateError):
            self.channel.close()
        self._over = True
        self._end()

    def _end(self) -> None:
        with self._idle:
            self._idle.notify_all()
        if self._sender is not None:
            threading.Thread(target=self._queue.put, args=(None,), daemon=True).start()
