"""Channels through shared memory, between processes of one host (docs/spec/channel.md, 8).

    >>> from isolate.channel.ring import CAPACITY, Counters
    >>> counters = Counters(memoryview(bytearray(512)))
    >>> counters.set(0, 7)
    >>> counters.get(0), CAPACITY
    (7, 2097152)

The handshake runs over a Unix socket; then the listener sends a sealed memfd with one ring per direction, and a
second socket. The records are those of every channel. Whoever else has the pages may change them at any moment, and
so may the peer: a counter is copied once and then checked, ciphertext is copied out before it is opened, and
plaintext is never in it. The memfd cannot shrink, or reading it could kill the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
import time
from typing import Any

from isolate.channel.session import Inbox
from isolate.errors import ChannelTimeout, HandshakeRefused, RecordRefused

CAPACITY = 1 << 21  # bytes of one direction
STEP = 1 << 19  # bytes copied before the other side is told: both then copy at once, and from their caches
PAGE = 4096  # of counters, before the two rings
SIZE = PAGE + 2 * CAPACITY
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_LINE = 128  # bytes between two counters, so that no two share a cache line (or a pair of them)
# A wake-up can be lost, since Python has no memory fence: nobody sleeps longer than this without looking again.
_NAP = 0.02  # seconds
_SPINS = 200  # looks before sleeping

# Counters: bytes written and bytes read per direction (0 is the listener's writing), and who sleeps.
_WRITTEN, _READ, _READER_SLEEPS, _WRITER_SLEEPS = 0, 1, 2, 3


class Counters:
    """64-bit words in shared memory, each in its own cache line.

    As items of a memoryview, which are stored at once: struct.pack_into writes zeros first, and the other side
    would see them.
    """

    __slots__ = ("_words",)

    def __init__(self, view: memoryview) -> None:
        self._words = view.cast("Q")

    def get(self, place: int) -> int:
        return self._words[place * (_LINE // 8)]

    def set(self, place: int, value: int) -> None:
        self._words[place * (_LINE // 8)] = value


class _Lane:
    """One direction: its counters, its pages, and our own count, which the peer cannot touch."""

    def __init__(self, view: memoryview, direction: int) -> None:
        start = direction * 4 * _LINE
        self.counters = Counters(view[start : start + 4 * _LINE])
        begin = PAGE + direction * CAPACITY
        self.data = view[begin : begin + CAPACITY]
        self.count = 0

    def readable(self) -> int:
        """How many bytes lie there. Raises RecordRefused for a counter that cannot be."""
        lies = self.counters.get(_WRITTEN) - self.count
        if not 0 <= lies <= CAPACITY:
            raise RecordRefused("a counter of the shared ring is impossible")
        return lies

    def writable(self) -> int:
        """How many bytes have room. Raises RecordRefused for a counter that cannot be."""
        lies = self.count - self.counters.get(_READ)
        if not 0 <= lies <= CAPACITY:
            raise RecordRefused("a counter of the shared ring is impossible")
        return CAPACITY - lies


class RingWire:
    """The wire of a channel whose records go through shared memory; the sockets only ring the bell.

    ``bell`` rings when bytes were written, ``space`` when bytes were read: two, because one thread may wait to send
    while another waits to receive.
    """

    def __init__(
        self, memory: mmap.mmap, bell: socket.socket, space: socket.socket, *, listener: bool, timeout: float | None
    ) -> None:
        self.inbox = Inbox()
        self.timeout = timeout
        self._memory, self._bell, self._space = memory, bell, space
        view = memoryview(memory)
        self._out, self._in = _Lane(view, 0 if listener else 1), _Lane(view, 1 if listener else 0)
        self._closed = False
        for one in (bell, space):
            one.setblocking(False)

    def fileno(self) -> int:
        return self._bell.fileno()

    def fill(self, need: int) -> bool:
        """Copy out until ``need`` bytes are in the inbox; False when the other end is gone."""
        inbox = self.inbox
        while len(inbox) < need:
            count = self.read_some(inbox.space(need))
            if not count:
                return False
            inbox.added(count)
        return True

    def read_some(self, space: memoryview) -> int:
        """Copy out what is there, at least one byte; 0 when the other end is gone."""
        lane = self._in
        there = self._wait(lane, self._bell, _READER_SLEEPS, lane.readable)
        if not there:
            return 0
        begin = lane.count % CAPACITY
        count = min(there, len(space), CAPACITY - begin, STEP)
        space[:count] = lane.data[begin : begin + count]
        lane.count += count
        lane.counters.set(_READ, lane.count)
        if lane.counters.get(_WRITER_SLEEPS):
            lane.counters.set(_WRITER_SLEEPS, 0)
            self._ring(self._space)
        return count

    def send(self, data: memoryview, /) -> bool:
        """Copy in all of it; False when the other end is gone."""
        lane, done = self._out, 0
        while done < len(data):
            room = self._wait(lane, self._space, _WRITER_SLEEPS, lane.writable)
            if not room:
                return False
            begin = lane.count % CAPACITY
            count = min(room, len(data) - done, CAPACITY - begin, STEP)
            lane.data[begin : begin + count] = data[done : done + count]
            done += count
            lane.count += count
            lane.counters.set(_WRITTEN, lane.count)
            if lane.counters.get(_READER_SLEEPS):
                lane.counters.set(_READER_SLEEPS, 0)
                self._ring(self._bell)
        return True

    def _wait(self, lane: _Lane, bell: socket.socket, flag: int, look: Any) -> int:
        """What ``look`` answers as soon as it is not 0; 0 when the other end is gone. Raises ChannelTimeout."""
        for _ in range(_SPINS):
            if found := look():
                return int(found)
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        poll = select.poll()
        try:
            poll.register(bell, select.POLLIN)
        except (OSError, ValueError):
            return 0
        while True:
            lane.counters.set(flag, 1)
            if found := look():
                return int(found)
            if self._closed:
                return 0
            if deadline is not None and time.monotonic() > deadline:
                raise ChannelTimeout("the peer does nothing in time")
            if poll.poll(_NAP * 1000):
                try:
                    # The peer can make a socket that it gave block: not this call.
                    gone = not bell.recv(4096, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                except OSError:
                    gone = True
                if gone:
                    # What was written before the end is still to be read.
                    return int(look())

    @staticmethod
    def _ring(bell: socket.socket) -> None:
        # A full socket is as good as rung.
        with contextlib.suppress(OSError):
            bell.send(b"\0", socket.MSG_DONTWAIT)

    def drop(self, *, shared: bool) -> None:
        self._closed = True
        for one in (self._bell, self._space):
            if not shared:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            one.close()


def offer(sock: socket.socket, timeout: float | None) -> RingWire:
    """The listener's part after the handshake: make the memory and send it."""
    memory_fd = os.memfd_create("isolate-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory_fd, SIZE)
        fcntl.fcntl(memory_fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(sock, [b"\0"], [memory_fd, theirs.fileno()])
        except OSError:
            ours.close()
            raise HandshakeRefused("the peer went away during the handshake", code="peer_gone") from None
        finally:
            theirs.close()
        return RingWire(mmap.mmap(memory_fd, SIZE), sock, ours, listener=True, timeout=timeout)
    finally:
        os.close(memory_fd)


def accept_offer(sock: socket.socket, timeout: float | None) -> RingWire:
    """The initiator's part: take the memory, and trust nothing about it. Raises HandshakeRefused."""
    try:
        _, descriptors, _, _ = socket.recv_fds(sock, 1, 2)
    except BlockingIOError:
        raise ChannelTimeout("the peer offered no shared memory in time") from None
    except OSError:
        descriptors = []
    try:
        if len(descriptors) != 2 or not _is_sealed(descriptors[0]):
            raise HandshakeRefused("the peer offers no sealed shared memory", code="malformed")
        try:
            space = socket.socket(fileno=os.dup(descriptors[1]))
            memory = mmap.mmap(descriptors[0], SIZE)
        except (OSError, ValueError):
            raise HandshakeRefused("the peer offers no sealed shared memory", code="malformed") from None
        return RingWire(memory, sock, space, listener=False, timeout=timeout)
    finally:
        for one in descriptors:
            os.close(one)


def _is_sealed(descriptor: int) -> bool:
    """Whether this is memory that cannot shrink: another answer of the kernel is no."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        return seals & _SEALS == _SEALS and os.fstat(descriptor).st_size == SIZE
    except OSError:
        return False
