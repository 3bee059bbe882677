"""Buffers that give no bytes, ends that only send, sockets that a peer gave, and bytes at the last moment."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from isolate import channel
from isolate.channel import Channel, Handshake, ring, streams
from isolate.channel.session import flat
from isolate.channel.streams import SocketWire
from isolate.errors import ChannelTimeout, UsageError


@pytest.mark.threat("CHAN-21")
def test_an_end_that_only_sends_renews_too(world: Any, together: Any) -> None:
    mine = world.attested(0)
    tokens, clock = [mine.token], [1e9]
    cores = (
        Handshake(
            initiator=True, identity=evolve(mine, token=lambda: tokens[-1]), expect=world.expect(1, max_stale=None)
        ),
        Handshake(initiator=False, identity=world.attested(1), expect=world.expect(0)),
    )
    wires = [SocketWire(end, 5.0) for end in socket.socketpair()]
    sessions = together(lambda: wires[0].handshake(cores[0]), lambda: wires[1].handshake(cores[1]))
    one, other = (Channel(wire, session) for wire, session in zip(wires, sessions, strict=True))
    for end in (one, other):
        end._end.standing.clock = lambda: clock[0]
    for _ in range(20):
        clock[0] += 300
        world.time[0] += 300
        tokens.append(world.renewed(mine, issued=world.time[0], expires=world.time[0] + 300))
        one.send(b"x")
        assert other.recv() == b"x"
    assert other.peer.result.expires == world.time[0] + 300
    one._end._sealer.until = 1e12
    # Between two looks for a newer token, a small message is one record and nothing else is done.
    assert one._end.single(memoryview(b"x")) is not None
    one.close()
    other.close()


@pytest.mark.parametrize("array", [
    np.array(["2020-01-01"], dtype="M8[s]"),
    np.array([object()]),
    np.array([(1, None)], dtype=[("Oops", "i4"), ("x", "O")]),
    np.zeros((4, 4))[:, ::2],
    np.zeros((4, 4), order="F"),
], ids=["times", "objects", "records with objects", "strided", "by columns"])  # fmt: skip
def test_what_gives_no_bytes_is_refused_by_type(array: Any) -> None:
    """Of Python objects an array has the addresses: they must not leave, and never come from a peer."""
    with pytest.raises(UsageError):
        flat(array)


def test_what_gives_bytes_is_taken(world: Any) -> None:
    for array in (
        np.zeros((0, 5)), np.zeros(3, dtype=">f4"), np.zeros(3, dtype=[("Oops", "i4")]), np.float32(3),
        np.zeros(3, dtype="?"), np.zeros((2, 3), dtype="c16"),
    ):  # fmt: skip
        assert len(flat(array)) == array.nbytes
    assert not flat(np.zeros((0, 5))).readonly


def test_tensors_that_give_no_bytes_are_refused_by_type() -> None:
    torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
    complexes = torch.zeros(3, dtype=torch.complex64)
    for tensor in (
        complexes.conj(), complexes.conj().imag, torch.eye(3).to_sparse(), torch.eye(3, 4).t(),
        torch.zeros(3, device="meta"), torch.zeros(1).expand(5),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            flat(tensor)
    for tensor in (torch.zeros(3, requires_grad=True), torch.zeros(0, 3), torch.tensor(1.0), complexes):
        assert len(flat(tensor)) == tensor.numel() * tensor.element_size() and not flat(tensor).readonly


@pytest.mark.threat("CHAN-25")
def test_nobody_blocks_in_a_socket_that_the_peer_gave() -> None:
    """Whoever gave a descriptor shares its flags: he makes it block again, and reads nothing."""
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, ring.SIZE)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    kept, given = socket.socketpair()
    socket.send_fds(theirs, [b"\0"], [memory, given.fileno()])
    wire = ring.accept_offer(ours, 1)
    given.setblocking(True)

    def work() -> None:
        for _ in range(5000):
            wire._ring(wire._space)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(5)
    stuck = thread.is_alive()
    wire.drop(shared=False)
    for one in (theirs, kept, given):
        one.close()
    os.close(memory)
    thread.join(5)
    assert not stuck


@pytest.mark.threat("CHAN-6")
def test_a_byte_at_the_last_moment_gains_no_time(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for that moment: the reader's own clock says, once the byte was read, that it is there."""
    with channel.listen(
        "tcp:127.0.0.1:0", identity=world.attested(1), expect=world.expect(0), timeout=30
    ) as listener:
        host, port = listener.address.split(":")[1:]
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"\x01")
            monkeypatch.setattr(streams, "LOOKS", 0)  # it waits at once, and is woken by the byte
            times = iter([0.0, 0.0])  # as the handshake begins, and as it begins to read
            clock = SimpleNamespace(monotonic=lambda: next(times, 29.8))
            monkeypatch.setattr(streams, "time", clock)
            began = time.monotonic()
            with pytest.raises(ChannelTimeout):
                listener.accept()
            assert time.monotonic() - began < 15
            assert next(times, None) is None


class Silent:
    """A socket where nothing comes, until it does; it counts how often somebody looks, and how often one sleeps."""

    def __init__(self) -> None:
        self.looks = self.sleeps = 0
        self.there = False

    def recv_into(self, space: Any, size: int = 0, flags: int = 0) -> int:
        if self.there:
            space[0] = 1
            return 1
        self.looks += 1
        raise BlockingIOError


def test_who_looks_in_vain_looks_more_and_more_seldom() -> None:
    one, other = socket.socketpair()
    with one, other:
        wire, silent = SocketWire(one, 1.0), Silent()
        wire._recv_into = silent.recv_into  # type: ignore[method-assign, assignment]
        wire._sleeps = 0
        gaps: list[int] = []
        for _ in range(8):
            before, waits = silent.looks, 0
            while silent.looks == before:
                assert wire._look()
                waits += 1
            gaps.append(waits - 1)
        assert gaps == [0, 31, 63, 127, 255, 511, 1023, 1023]
        # Something came when it was looked for: from then on as in the beginning.
        wire._sleeps, silent.there = 0, True
        assert wire._look()
        silent.there = False
        assert wire._look()
        assert wire._sleeps == 31


def test_an_interrupted_reader_has_its_whole_timeout_again() -> None:
    one, other = socket.socketpair()
    with one, other:
        wire = SocketWire(one, 5.0)
        whole = one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
        during = b""

        def begin_and_stop(space: Any, *_: Any) -> int:
            nonlocal during
            if wire.inbox.end == 2:
                during = one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
                raise KeyboardInterrupt
            time.sleep(0.05)  # longer than the kernel's tick, to which it rounds
            return 1

        wire._recv_into = begin_and_stop  # type: ignore[method-assign, assignment]
        wire._sleeps = 1
        with pytest.raises(KeyboardInterrupt):
            wire.fill(100)
        assert during != whole, "the rest of a record is waited for no longer than is left"
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == whole
