"""The shared-memory ring against pages that change at any moment, and memory that is not what was promised."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolate import channel
from isolate.channel import Channel, ring
from isolate.errors import ChannelError, ChannelTimeout, HandshakeRefused, RecordRefused, UsageError

Both = Callable[[Callable[[], Any], Callable[[], Any]], tuple[Any, Any]]


@pytest.fixture
def linked(world: Any, tmp_path: Path, together: Both) -> Iterator[tuple[Channel, Channel]]:
    address = f"shm:{tmp_path}/ring"
    with channel.listen(address, identity=world.attested(1), expect=world.expect(0), timeout=2) as listener:
        one, other = together(
            lambda: channel.connect(address, identity=world.attested(0), expect=world.expect(1), timeout=2),
            listener.accept,
        )
    with one, other:
        yield one, other


def pages(end: Channel) -> mmap.mmap:
    memory: mmap.mmap = end._wire._memory  # type: ignore[attr-defined]
    return memory


def test_plaintext_is_never_in_the_pages(linked: tuple[Channel, Channel], together: Both) -> None:
    one, other = linked
    canary = os.urandom(64)
    message = canary * 40_000
    _, got = together(lambda: one.send(message), other.recv)
    assert got == message
    assert canary[:16] not in pages(one)[:] and canary[:16] not in pages(other)[:]
    # The search can find: in a copy with the canary it does.
    assert canary[:16] in pages(one)[:] + canary


@pytest.mark.threat("CHAN-25")
def test_pages_that_change_while_records_are_opened(linked: tuple[Channel, Channel], together: Both) -> None:
    """A scribbler writes into the rings all the time. What is delivered is what was sent, or there is an error."""
    one, other = linked
    memory, stop = memoryview(pages(one)), threading.Event()
    message = os.urandom(3 << 20)

    def scribble() -> None:
        draw = random.Random(1)
        while not stop.is_set():
            memory[ring.PAGE + draw.randrange(2 * ring.CAPACITY)] = draw.randrange(256)

    scribbler = threading.Thread(target=scribble)
    scribbler.start()

    def receive() -> int:
        target, count = bytearray(len(message)), 0
        try:
            while True:
                other.recv_into(target)
                assert target == message
                count += 1
                target[:] = bytes(len(target))
        except ChannelError as error:
            assert isinstance(error, RecordRefused | ChannelTimeout), error
            assert not any(target)
        return count

    def send() -> None:
        try:
            for _ in range(200):
                one.send(message)
        except ChannelError:
            return

    try:
        _, count = together(send, receive)
    finally:
        stop.set()
        scribbler.join()
    assert not isinstance(count, BaseException), count


@pytest.mark.threat("CHAN-25")
@pytest.mark.parametrize("when", ["parse", "open"])
def test_pages_rewritten_when_a_record_is_looked_at(
    linked: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Between the copy and the header, and between the header and the opening: every byte of the rings changes."""
    one, other = linked
    opener, memory, rewritten = other._end._opener, memoryview(pages(other)), []
    cls = type(opener)

    def rewrite() -> None:
        rewritten.append(True)
        memory[ring.PAGE :] = b"\xa5" * (len(memory) - ring.PAGE)

    def parse(raw: bytearray, at: int, parse: Any = cls.parse) -> Any:
        rewrite()
        return parse(raw, at)

    def opens(self: Any, pin: Any, at: int, *rest: Any, opens: Any = cls.open) -> Any:
        rewrite()
        return opens(self, pin, at, *rest)

    monkeypatch.setattr(cls, *((when, staticmethod(parse)) if when == "parse" else (when, opens)))
    for size in (64, 3000):
        message, target = os.urandom(size), bytearray(size)
        one.send(message)
        assert other.recv_into(target) == size and target == message
    assert len(rewritten) >= 2


@pytest.mark.threat("CHAN-25")
@pytest.mark.parametrize("value", [0, 1, ring.CAPACITY + 10_000, 2**63, 2**64 - 1])
@pytest.mark.parametrize("word", range(4))
@pytest.mark.parametrize("direction", [0, 1])
def test_impossible_counters(
    linked: tuple[Channel, Channel], together: Both, direction: int, word: int, value: int
) -> None:
    """Any value of any counter, set before and between messages: an error or the right bytes, never a hang."""
    one, other = linked
    for end in (one, other):
        end._wire.timeout = 0.3  # type: ignore[attr-defined]
    counters = ring.Counters(memoryview(pages(one))[direction * 512 : direction * 512 + 512])

    def send() -> None:
        try:
            for number in range(4):
                one.send(bytes([number]) * 1000)
                counters.set(word, value)
        except ChannelError:
            return

    def receive() -> list[bytes]:
        got = []
        try:
            for _ in range(4):
                got.append(bytes(other.recv()))
                counters.set(word, value)
        except ChannelError:
            pass
        return got

    began = time.monotonic()
    _, got = together(send, receive)
    assert time.monotonic() - began < 5
    assert got == [bytes([number]) * 1000 for number in range(len(got))]


@pytest.mark.parametrize("value", [1, ring.CAPACITY + 11, 2**63, 2**64 - 1])
def test_a_counter_out_of_reach_is_refused(value: int) -> None:
    lane = ring._Lane(memoryview(bytearray(ring.SIZE)), 0)
    lane.count = 10
    lane.counters.set(0, value)
    lane.counters.set(1, value if value > 1 else 11)
    with pytest.raises(RecordRefused):
        lane.readable()
    with pytest.raises(RecordRefused):
        lane.writable()


def test_counters_are_never_seen_half_written() -> None:
    """struct.pack_into would show zeros in between, and the reader would take the peer for a liar."""
    counters, stop, seen = ring.Counters(memoryview(mmap.mmap(-1, 4096))[:512]), [], set()
    counters.set(0, 2**40)
    child = os.fork()
    if child == 0:
        for turn in range(300_000):
            counters.set(0, 2**40 + turn)
        os._exit(0)
    while not stop:
        seen.update(counters.get(0) >> 40 for _ in range(1000))
        stop = [True] if os.waitpid(child, os.WNOHANG)[0] else []
    assert seen == {1}


def test_a_slow_reader_holds_the_writer_and_a_dead_one_ends_it(linked: tuple[Channel, Channel]) -> None:
    one, other = linked
    one._wire.timeout = 0.2  # type: ignore[attr-defined]
    with pytest.raises(ChannelTimeout):
        one.send(bytes(ring.CAPACITY + 1))
    with pytest.raises(ChannelError):
        for _ in range(3):
            other.recv()


@pytest.mark.parametrize("fault", ["nothing", "a file", "not sealed", "too short", "no socket"])
def test_memory_that_is_not_what_was_promised(tmp_path: Path, fault: str) -> None:
    """Memory that can shrink would kill the reader (SIGBUS): the kernel's seals are asked, not the peer."""
    ours, theirs = socket.socketpair()
    ours.settimeout(1)
    memory = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, ring.SIZE - (4096 if fault == "too short" else 0))
    if fault != "not sealed":
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, ring.SIZE)
    sent = {"nothing": [], "a file": [plain, theirs.fileno()], "no socket": [memory, plain]}
    socket.send_fds(theirs, [b"\0"], sent.get(fault, [memory, theirs.fileno()]))
    with pytest.raises(HandshakeRefused):
        ring.accept_offer(ours, 1)
    for one in (ours, theirs):
        one.close()
    for descriptor in (memory, plain):
        os.close(descriptor)


def test_the_ring_is_not_for_asyncio(world: Any, tmp_path: Path) -> None:
    import asyncio

    from isolate.channel import aio

    with pytest.raises(UsageError):
        asyncio.run(aio.listen(f"shm:{tmp_path}/x", identity=world.attested(0), expect=world.expect(1)))
    with pytest.raises(UsageError):
        asyncio.run(aio.connect(f"shm:{tmp_path}/x", identity=world.attested(0), expect=world.expect(1)))
