"""Channels over real sockets: messages, ends, refusals, timeouts, killed and silent peers."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import channel
from isolate.channel import Channel, Holder, Listener, streams
from isolate.crypto.aead import Suite
from isolate.crypto.signing import SigningKey
from isolate.errors import (
    ChannelClosed,
    ChannelTimeout,
    ChannelTruncated,
    HandshakeRefused,
    IsolateError,
    RecordRefused,
    StorageError,
    UnavailableError,
    UsageError,
)

Both = Callable[[Callable[[], Any], Callable[[], Any]], tuple[Any, Any]]


@pytest.fixture(params=["tcp", "unix", "shm"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "tcp:127.0.0.1:0" if request.param == "tcp" else f"{request.param}:{tmp_path}/socket"


@pytest.fixture
def listener(world: Any, address: str) -> Iterator[Listener]:
    with channel.listen(address, identity=world.attested(1), expect=world.expect(0), timeout=5) as one:
        yield one


@pytest.fixture
def linked(world: Any, listener: Listener, together: Both) -> Iterator[tuple[Channel, Channel]]:
    one, other = together(
        lambda: channel.connect(listener.address, identity=world.attested(0), expect=world.expect(1), timeout=5),
        listener.accept,
    )
    with one, other:
        yield one, other


def hurry(end: Channel, seconds: float) -> None:
    """From now on it waits no longer than this. A handshake has more: it is not in a hurry on a busy machine."""
    end._wire.timeout = seconds
    if isinstance(end._wire, streams.SocketWire):
        streams._set_timeout(end._wire.sock, seconds)


def test_messages_of_every_size_arrive(linked: tuple[Channel, Channel], together: Both) -> None:
    one, other = linked
    for size in (0, 1, 64, 4063, 4064, 4096, 65536, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_500_001):
        data = os.urandom(size)
        _, got = together(lambda data=data: one.send(data), other.recv)
        assert got == data
        buffer = bytearray(size + 5)
        _, count = together(lambda data=data: other.send(data), lambda buffer=buffer: one.recv_into(buffer))
        assert count == size and buffer[:size] == data and not any(buffer[size:])


def test_many_small_messages_stay_apart(linked: tuple[Channel, Channel]) -> None:
    one, other = linked
    for number in range(50):
        one.send(b"%d" % number)
    assert [other.recv() for _ in range(50)] == [b"%d" % number for number in range(50)]


def test_arrays_go_out_and_come_in_place(linked: tuple[Channel, Channel]) -> None:
    one, other = linked
    array = np.arange(1000, dtype=np.float32).reshape(10, 100)
    one.send(array)
    got = np.zeros_like(array)
    assert other.recv_into(got) == array.nbytes
    assert (got == array).all()
    with pytest.raises(UsageError):
        one.send(array[:, ::2])
    with pytest.raises(UsageError):
        one.send("text")  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        other.recv_into(b"read-only")


def test_torch_tensors_go_out_and_come_in_place(linked: tuple[Channel, Channel]) -> None:
    torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
    one, other = linked
    tensor = torch.arange(100, dtype=torch.bfloat16)
    one.send(tensor)
    got = torch.zeros_like(tensor)
    assert other.recv_into(got) == 200
    assert torch.equal(got, tensor)


def test_a_message_too_long_for_the_buffer_stays(linked: tuple[Channel, Channel], together: Both) -> None:
    one, other = linked
    for size in (100, 2_000_000):
        data = os.urandom(size)

        def receive(size: int = size) -> bytes:
            with pytest.raises(UsageError, match=str(size)):
                other.recv_into(bytearray(size - 1))
            return bytes(other.recv())

        assert together(lambda data=data: one.send(data), receive)[1] == data


@pytest.mark.threat("CHAN-3")
def test_a_close_is_told_from_a_cut(linked: tuple[Channel, Channel]) -> None:
    one, other = linked
    one.send(b"last")
    one.close()
    assert other.recv() == b"last"
    with pytest.raises(ChannelClosed):
        other.recv()
    with pytest.raises(ChannelClosed):
        one.send(b"more")
    one.close()


class Untouchable:
    """In the place of a lock that is taken, and that nobody may wait for."""

    @staticmethod
    def acquire(*, blocking: bool) -> bool:
        assert not blocking
        return False


def test_an_abort_wakes_who_waits_and_is_no_close(linked: tuple[Channel, Channel], together: Both) -> None:
    """Though somebody is stuck in sending, for whom a close waits."""
    one, other = linked

    def abort() -> None:
        end, lock = one._end, one._end.sending
        while not (lock.locked() and end.receiving.locked()):
            time.sleep(0.01)
        end.sending = Untouchable()  # type: ignore[assignment]
        one.abort("enough of it")
        end.sending = lock

    (sent, got), failed = together(lambda: together(lambda: one.send(bytes(64 << 20)), one.recv), abort)
    assert isinstance(sent, ChannelClosed) and isinstance(got, ChannelClosed) and failed is None
    with pytest.raises(ChannelClosed, match="enough of it"):
        one.send(b"more")
    with pytest.raises(ChannelTruncated):
        while True:
            other.recv()
    one.abort()
    with pytest.raises(ChannelClosed, match="enough of it"):
        one.recv()


def test_what_was_sent_before_a_close_arrives_though_nobody_read_the_other_way(
    linked: tuple[Channel, Channel], together: Both
) -> None:
    one, other = linked
    other.send(bytes(50_000))

    def finish() -> None:
        one.send(bytes(1 << 20))
        one.close()

    def receive() -> int:
        count = len(other.recv())
        with pytest.raises(ChannelClosed):
            other.recv()
        return count

    assert together(finish, receive)[1] == 1 << 20


def test_closing_wakes_who_reads(linked: tuple[Channel, Channel], together: Both) -> None:
    one, _ = linked

    def close() -> None:
        time.sleep(0.05)
        one.close()

    found, _ = together(one.recv, close)
    assert isinstance(found, ChannelClosed), found


@pytest.mark.parametrize("address", ["unix"], indirect=True)
def test_closing_wakes_who_is_stuck_in_sending(linked: tuple[Channel, Channel], together: Both) -> None:
    """It is waited for a second, so that a close can be told behind what is sent, and no longer."""
    one, _ = linked
    began = time.monotonic()

    def close() -> None:
        time.sleep(0.05)
        one.close()

    found, _ = together(lambda: one.send(bytes(64 << 20)), close)
    # And not ChannelTimeout, which it is for who is left to wait.
    assert isinstance(found, ChannelClosed), found
    assert time.monotonic() - began < 3


@pytest.mark.threat("CHAN-3")
@pytest.mark.parametrize("cut", ["at a record's end", "inside a record"])
def test_a_cut_is_no_close(linked: tuple[Channel, Channel], cut: str) -> None:
    one, other = linked
    one.send(b"first")
    if cut == "inside a record":
        with one._end.sending:
            record = bytes(one._end._sealer.seal(channel.record.Kind.DATA, b"second"))
            one._wire.send(record[:-1])
    one._wire.drop(shared=False)
    assert other.recv() == b"first"
    with pytest.raises(ChannelTruncated):
        other.recv()
    with pytest.raises(ChannelClosed):
        other.recv()


@pytest.mark.threat("CHAN-4")
def test_the_identical_twin_is_refused(world: Any, address: str, together: Both) -> None:
    """Same measurement, same policy, same job and rank, appraised by the same service: and not the pinned one."""
    right, twin = world.attested(1), world.attested(1)
    from isolate.attestation.evidence import instance_id

    pinned = world.expect(1, instance=instance_id(right.keys.digest))
    for identity, good in ((right, True), (twin, False)):
        with channel.listen(address, identity=identity, expect=world.expect(0), timeout=5) as listener:
            one, other = together(
                lambda listener=listener: channel.connect(
                    listener.address, identity=world.attested(0), expect=pinned, timeout=5
                ),
                listener.accept,
            )
        if good:
            one.close()
            other.close()
        else:
            assert isinstance(one, HandshakeRefused) and one.code == "wrong_instance"
            assert isinstance(other, HandshakeRefused) and other.code == "peer_refused"
            assert "wrong_instance" in str(other)


def test_a_listener_that_refused_one_accepts_the_next(world: Any, listener: Listener, together: Both) -> None:
    def try_connect(identity: Any) -> Callable[[], Channel]:
        return lambda: channel.connect(listener.address, identity=identity, expect=world.expect(1), timeout=5)

    stranger = world.attested(0, issuer=SigningKey.generate())
    one, other = together(try_connect(stranger), listener.accept)
    assert isinstance(other, HandshakeRefused) and other.code == "result_signature"
    assert isinstance(one, HandshakeRefused) and one.code == "peer_refused"
    with socket.socket(socket.AF_UNIX if "tcp" not in listener.address else socket.AF_INET) as noise:
        where = listener.address.partition(":")[2]
        noise.connect(where if "tcp" not in listener.address else (where.split(":")[0], int(where.split(":")[1])))
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(HandshakeRefused):
            listener.accept()
    one, other = together(try_connect(world.attested(0)), listener.accept)
    one.send(b"x")
    assert other.recv() == b"x"
    one.close()
    other.close()


def test_a_client_is_known_by_its_holder_key(world: Any, address: str, together: Both) -> None:
    key = SigningKey.generate()
    with channel.listen(address, identity=world.attested(1), profile="client", timeout=5) as listener:
        one, other = together(
            lambda: channel.connect(listener.address, identity=Holder(key), expect=world.expect(1), timeout=5),
            listener.accept,
        )
    with one, other:
        assert other.peer.public == key.verifying_key.ed25519
        assert one.peer.result.slot.rank == 1
        assert one.binding == other.binding and len(one.binding) == 32


@pytest.mark.parametrize("suite", list(Suite))
def test_every_suite(world: Any, address: str, together: Both, suite: Suite) -> None:
    with channel.listen(address, identity=world.attested(1), expect=world.expect(0), suites=[suite]) as listener:
        one, other = together(
            lambda: channel.connect(
                listener.address, identity=world.attested(0), expect=world.expect(1), suites=[suite]
            ),
            listener.accept,
        )
    with one, other:
        one.send(b"x" * 100)
        assert other.recv() == b"x" * 100 and one.suite is suite


@pytest.mark.threat("CHAN-5")
@pytest.mark.parametrize("place", [0, 4, 7, 8, 50, -1])
def test_one_flipped_byte_ends_both_sides(world: Any, address: str, together: Both, place: int) -> None:
    """The relay of the demo: every frame passes, until one byte of a record is flipped."""
    with channel.listen(address, identity=world.attested(1), expect=world.expect(0), timeout=5) as listener:
        one, other = together(
            lambda: channel.connect(
                listener.address, identity=world.attested(0), expect=world.expect(1), timeout=5
            ),
            listener.accept,
        )
        hurry(other, 0.3)
        send = one._wire.send

        def flip(data: memoryview) -> bool:
            bent = bytearray(data)
            bent[place] ^= 1
            return bool(send(bent))

        one._wire.send = flip
        one.send(b"x" * 100)
        one._wire.send = send
        buffer = bytearray(1 << 20)
        with pytest.raises((RecordRefused, ChannelTimeout)):
            other.recv_into(buffer)
        assert not any(buffer)
        with pytest.raises(ChannelTruncated):
            one.recv()


def test_timeouts_are_typed_and_bounded(world: Any, address: str, together: Both) -> None:
    with channel.listen(address, identity=world.attested(1), expect=world.expect(0), timeout=5) as listener:
        one, other = together(
            lambda: channel.connect(
                listener.address, identity=world.attested(0), expect=world.expect(1), timeout=5
            ),
            lambda: listener.accept(5),
        )
        for end in (one, other):
            hurry(end, 0.3)
        began = time.monotonic()
        with pytest.raises(ChannelTimeout):
            other.recv()
        one.send(b"late")
        assert other.recv() == b"late"
        # Nobody reads: the kernel's buffers fill, and the sender is not held for ever.
        with pytest.raises(ChannelTimeout):
            for _ in range(200):
                one.send(bytes(1 << 20))
        with pytest.raises(ChannelClosed):
            one.send(b"x")
        assert time.monotonic() - began < 10
        with pytest.raises(ChannelTimeout, match="nobody connected"):
            listener.accept(0.05)
        one.close()
        other.close()


@pytest.mark.threat("CHAN-6")
def test_silent_and_dripping_peers_are_dropped(world: Any, listener: Listener) -> None:
    listener._timeout = 0.3
    where = listener.address.partition(":")[2]

    def dial() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX if "tcp" not in listener.address else socket.AF_INET)
        sock.connect(where if "tcp" not in listener.address else (where.split(":")[0], int(where.split(":")[1])))
        return sock

    began = time.monotonic()
    with dial(), pytest.raises(ChannelTimeout):
        listener.accept()
    stop = threading.Event()
    with dial() as dripping:

        def drip() -> None:
            """A good header at once, and the body that it promises byte by byte: it would take two minutes."""
            dripping.sendall(b"\x01\0\0\0\0\0\x08\0ISOC")
            while not stop.wait(0.05):
                try:
                    dripping.sendall(b"\0")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(ChannelTimeout):
            listener.accept()
        stop.set()
        thread.join()
    assert time.monotonic() - began < 3


@pytest.mark.threat("CHAN-7")
def test_a_forked_child_cannot_use_the_channel(linked: tuple[Channel, Channel]) -> None:
    """The same key and counter in two processes would be a nonce used twice."""
    one, other = linked
    child = os.fork()
    if child == 0:
        code = 1
        try:
            one.send(b"from the child")
        except ChannelClosed:
            try:
                other.recv()
            except ChannelClosed:
                one.close()
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    one.send(b"from the parent")
    assert other.recv() == b"from the parent"


def test_a_killed_peer_is_a_cut(world: Any, address: str) -> None:
    with channel.listen(address, identity=world.attested(1), expect=world.expect(0), timeout=5) as listener:
        child = os.fork()
        if child == 0:
            try:
                mine = channel.connect(
                    listener.address, identity=world.attested(0), expect=world.expect(1), timeout=5
                )
                mine.send(b"alive")
                signal.pause()
            finally:
                os._exit(1)
        with listener.accept(10) as other:
            assert other.recv() == b"alive"
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with pytest.raises(ChannelTruncated):
                other.recv()


def test_a_killed_peer_is_a_cut_though_its_child_lives_on(world: Any, address: str) -> None:
    """As the workers of a data loader do, for a while."""
    with channel.listen(address, identity=world.attested(1), expect=world.expect(0), timeout=5) as listener:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                mine = channel.connect(
                    listener.address, identity=world.attested(0), expect=world.expect(1), timeout=5
                )
                grandchild = os.fork()
                if grandchild:
                    os.write(write, b"%d" % grandchild)
                    mine.send(b"alive")
                signal.pause()
            finally:
                os._exit(1)
        with listener.accept(10) as other:
            assert other.recv() == b"alive"
            grandchild = int(os.read(read, 20))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            try:
                with pytest.raises(ChannelTruncated):
                    other.recv()
            finally:
                os.kill(grandchild, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_addresses_that_are_none(world: Any, tmp_path: Path) -> None:
    options = {"identity": world.attested(0), "expect": world.expect(1)}
    for wrong in ("", "tcp:host", "tcp:host:99999", "udp:h:1", "unix:", f"unix:/{'x' * 200}", "tcp::1", "tcp:[]:1"):
        with pytest.raises(UsageError):
            channel.connect(wrong, **options)
    with pytest.raises(UnavailableError):
        channel.connect(f"unix:{tmp_path}/nobody", **options)
    with pytest.raises(StorageError):
        channel.listen(f"unix:{tmp_path}/no/folder", **options)
    with pytest.raises(UsageError):
        channel.listen("tcp:127.0.0.1:0", identity=world.attested(0))


def test_a_dead_listeners_socket_file_is_taken_over_and_a_live_one_not(world: Any, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    options = {"identity": world.attested(0), "expect": world.expect(1)}
    with channel.listen(f"unix:{path}", **options):
        with pytest.raises(StorageError):
            channel.listen(f"unix:{path}", **options)
        assert path.exists()
    assert not path.exists()


def test_nothing_of_a_channel_is_shown_or_saved(linked: tuple[Channel, Channel]) -> None:
    import pickle

    one, _ = linked
    assert one.binding.hex() not in repr(one)
    for value in (one.peer.result, one._end._sealer._key):
        with pytest.raises(IsolateError):
            pickle.dumps(value)
