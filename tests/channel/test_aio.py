"""The same channels under asyncio: messages, cancellation, back-pressure, timeouts, closing while waiting."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from isolate import channel
from isolate.channel import Holder, aio
from isolate.crypto.signing import SigningKey
from isolate.errors import (
    ChannelClosed,
    ChannelTimeout,
    ChannelTruncated,
    HandshakeRefused,
    Revoked,
    UnavailableError,
    UsageError,
)

Linked = Callable[..., Any]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


@pytest.fixture(params=["tcp", "unix"])
def linked(request: pytest.FixtureRequest, world: Any, tmp_path: Path) -> Linked:
    address = "tcp:127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/socket"

    @asynccontextmanager
    async def both(timeout: float = 5, **ours: Any) -> AsyncIterator[tuple[aio.Channel, aio.Channel]]:
        listener = await aio.listen(address, identity=world.attested(1), expect=world.expect(0), timeout=timeout)
        async with listener:
            options = {"identity": world.attested(0), "expect": world.expect(1), "timeout": timeout, **ours}
            one, other = await asyncio.gather(aio.connect(listener.address, **options), listener.accept())
            async with one, other:
                yield one, other

    return both


def test_messages_of_every_size_arrive(linked: Linked) -> None:
    async def work() -> None:
        async with linked() as (one, other):
            assert one.binding == other.binding and one.peer.result.slot.rank == 1
            for size in (0, 64, 4096, 1 << 20, 3_500_001):
                data = os.urandom(size)
                _, got = await asyncio.gather(one.send(data), other.recv())
                assert got == data
                buffer = bytearray(size)
                _, count = await asyncio.gather(other.send(data), one.recv_into(buffer))
                assert count == size and buffer == data
            with pytest.raises(UsageError):
                await one.recv_into(b"read-only")
            await one.close()
            with pytest.raises(ChannelClosed):
                await other.recv()

    run(work())


def test_a_cancelled_reader_loses_nothing(linked: Linked) -> None:
    async def work() -> None:
        async with linked() as (one, other):
            for number in range(20):
                task = asyncio.create_task(other.recv())
                await asyncio.sleep(0)
                # The cancellation and the message race, in both orders.
                if number % 2:
                    await one.send(b"%d" % number)
                task.cancel()
                got = None
                with suppress(asyncio.CancelledError):
                    got = await task
                if not number % 2:
                    await one.send(b"%d" % number)
                assert (got or await other.recv()) == b"%d" % number

    run(work())


def test_cancelled_within_a_message_is_the_end(linked: Linked) -> None:
    async def work() -> None:
        async with linked() as (one, other):
            sender = asyncio.create_task(one.send(bytes(64 << 20)))
            buffer = bytearray(64 << 20)
            reader = asyncio.create_task(other.recv_into(buffer))
            while not other._end.within_long:
                await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            with pytest.raises(ChannelClosed):
                await other.recv()
            with pytest.raises(ChannelTruncated):
                await sender

    run(work())


def test_a_slow_reader_holds_the_writer_back(linked: Linked) -> None:
    async def work() -> None:
        async with linked() as (one, other):
            sender = asyncio.create_task(one.send(bytes(64 << 20)))
            done, _ = await asyncio.wait([sender], timeout=0.3)
            assert not done
            assert len(await other.recv()) == 64 << 20
            await sender

    run(work())


def test_timeouts(linked: Linked) -> None:
    async def work() -> None:
        async with linked() as (one, other):
            one._wire.timeout = other._wire.timeout = 0.2
            with pytest.raises(ChannelTimeout):
                await other.recv()
            await one.send(b"late")
            assert await other.recv() == b"late"
            with pytest.raises(ChannelTimeout):
                await one.send(bytes(64 << 20))
            with pytest.raises(ChannelClosed):
                await one.send(b"x")

    run(work())


def test_closing_wakes_who_waits(linked: Linked) -> None:
    async def work() -> None:
        async with linked() as (one, _):
            reader = asyncio.create_task(one.recv())
            await asyncio.sleep(0.05)
            await one.close()
            with pytest.raises(ChannelClosed):
                await reader

    run(work())


def test_an_abort_wakes_who_waits_and_is_no_close(linked: Linked) -> None:
    async def work() -> None:
        async with linked() as (one, other):
            reader = asyncio.create_task(one.recv())
            await asyncio.sleep(0.05)
            one.abort("enough of it")
            with pytest.raises(ChannelClosed):
                await reader
            with pytest.raises(ChannelClosed, match="enough of it"):
                await one.send(b"more")
            with pytest.raises(ChannelTruncated):
                await other.recv()

    run(work())


def test_refusals_and_blocking_peers(world: Any, tmp_path: Path) -> None:
    """One listener, a refused peer, then a blocking one of the other module: the wire is the same."""

    async def work() -> None:
        address = f"unix:{tmp_path}/socket"
        async with await aio.listen(address, identity=world.attested(1), expect=world.expect(0)) as listener:
            with pytest.raises(ChannelTimeout):
                await listener.accept(0.05)
            one, other = await asyncio.gather(
                aio.connect(address, identity=world.attested(3), expect=world.expect(1)),
                listener.accept(),
                return_exceptions=True,
            )
            assert isinstance(one, HandshakeRefused) and isinstance(other, HandshakeRefused)
            assert other.code == "wrong_rank" and one.code == "peer_refused"
            blocking, ours = await asyncio.gather(
                asyncio.to_thread(
                    channel.connect, address, identity=world.attested(0), expect=world.expect(1), timeout=5
                ),
                listener.accept(),
            )
            async with ours:
                await ours.send(b"hello")
                assert await asyncio.to_thread(blocking.recv) == b"hello"
                blocking.close()

    run(work())


def public(kind: Any) -> dict[str, list[str]]:
    """The public names of a class, with the parameters of what can be called."""
    return {
        name: list(inspect.signature(value).parameters) if callable(value) else []
        for name, value in vars(kind).items()
        if not name.startswith("_")
    }


def test_the_names_are_those_of_the_blocking_channel() -> None:
    assert public(aio.Channel) == public(channel.Channel)
    assert public(aio.Listener) == public(channel.Listener)
    for name in ("connect", "listen"):
        ours, theirs = (inspect.signature(getattr(one, name)).parameters for one in (aio, channel))
        assert list(ours.values()) == list(theirs.values())
    for kind in (aio.Channel, aio.Listener):
        assert {"__aenter__", "__aexit__"} <= set(vars(kind))


class Full:
    """A socket whose buffer is full at the next attempt to send."""

    def __init__(self, sock: Any) -> None:
        self._sock, self._full = sock, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: Any) -> int:
        if self._full:
            self._full = False
            raise BlockingIOError
        return int(self._sock.send(data))


@pytest.mark.threat("CHAN-3")
def test_a_close_behind_a_long_message_is_told(linked: Linked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's buffer is full of the message when the close comes: it is no cut, however slow the reader is."""
    monkeypatch.setattr(aio, "GOODBYE", 10)

    async def work() -> None:
        for size in (0, 300_000, 3_000_000):
            async with linked() as (one, other):
                await other.send(bytes(50_000))  # which nobody will read

                async def finish(one: aio.Channel = one, size: int = size) -> None:
                    await one.send(bytes(size))
                    # As full as it can be: whether it really is, is the kernel's affair.
                    one._wire.sock = Full(one._wire.sock)  # type: ignore[assignment]
                    await one.close()

                sender = asyncio.create_task(finish())
                await asyncio.sleep(0.05)
                assert len(await other.recv()) == size
                with pytest.raises(ChannelClosed):
                    await other.recv()
                await sender

    run(work())


def test_a_close_waits_for_no_reader_that_is_stuck(linked: Linked) -> None:
    async def work() -> None:
        async with linked() as (one, _):
            sender = asyncio.create_task(one.send(bytes(64 << 20)))
            await asyncio.sleep(0.05)
            began = time.monotonic()
            await one.close()
            assert time.monotonic() - began < 0.5
            with pytest.raises(ChannelClosed):
                await sender

    run(work())


@pytest.mark.threat("CHAN-23")
@pytest.mark.parametrize("what", ["send", "recv", "recv_into"])
def test_a_revoked_measurement_ends_live_sessions(linked: Linked, world: Any, what: str) -> None:
    """Before anything goes out, and before anything that came is handed out: and the peer is told the reason."""
    revoked: list[bool] = []

    def recheck(peer: Any) -> None:
        if revoked:
            raise Revoked("this measurement was revoked")

    async def work() -> None:
        async with linked(expect=world.expect(1, recheck=recheck, recheck_every=0)) as (one, other):
            await one.send(b"x")
            assert await other.recv() == b"x"
            await other.send(b"secret")
            revoked.append(True)
            buffer = bytearray(6)
            uses: dict[str, Callable[[], Any]] = {
                "send": lambda: one.send(b"more"),
                "recv": one.recv,
                "recv_into": lambda: one.recv_into(buffer),
            }
            with pytest.raises(HandshakeRefused) as refused:
                await uses[what]()
            assert refused.value.code == "revoked" and not any(buffer)
            with pytest.raises(ChannelClosed, match="revoked"):
                await other.recv()
            with pytest.raises(ChannelClosed):
                await one.send(b"x")

    run(work())


@pytest.mark.threat("CHAN-21")
@pytest.mark.parametrize("how", ["by hand", "a sender", "a reader"])
def test_a_newer_token_is_shown(linked: Linked, world: Any, how: str) -> None:
    """Also by an end that only ever sends, or only ever reads."""
    mine = world.attested(0)
    tokens, clock = [mine.token], [0.0]

    async def work() -> None:
        async with linked(identity=evolve(mine, token=lambda: tokens[-1])) as (one, other):
            old = other.peer
            one._end.standing.clock = lambda: clock[0]
            tokens.append(world.renewed(mine, expires=1_800_000_289))
            clock[0] += 1e9
            if how == "by hand":
                await one.reattest()
            elif how == "a reader":
                await other.send(b"y")
                assert await one.recv() == b"y"
                clock[0] = 0.0
            await one.send(b"x")
            assert await other.recv() == b"x"
            assert (old.result.expires, other.peer.result.expires) == (1_800_000_290, 1_800_000_289)

    run(work())


def test_a_client_has_nothing_to_show_again(world: Any, tmp_path: Path) -> None:
    async def work() -> None:
        address = f"unix:{tmp_path}/socket"
        holder = Holder(SigningKey.generate())
        async with await aio.listen(address, identity=world.attested(1), profile="client") as listener:
            one, other = await asyncio.gather(
                aio.connect(address, identity=holder, expect=world.expect(1)), listener.accept()
            )
        async with one, other:
            with pytest.raises(UsageError):
                await one.reattest()
            assert one.suite is other.suite and one.fileno() != other.fileno()
            assert one.binding.hex() not in repr(one)

    run(work())


@pytest.mark.threat("CHAN-7")
def test_a_forked_child_cannot_use_the_channel(linked: Linked) -> None:
    async def work() -> None:
        async with linked() as (one, other):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    one._end.check_open()
                except ChannelClosed:
                    try:
                        one._end._sealer.seal(16, memoryview(b"x"))
                    except UsageError:
                        one.abort()
                        code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            await one.send(b"from the parent")
            assert await other.recv() == b"from the parent"

    run(work())


@pytest.mark.threat("CHAN-6")
def test_silent_and_malformed_peers_are_dropped(world: Any, tmp_path: Path) -> None:
    async def work() -> None:
        address = f"unix:{tmp_path}/socket"
        async with await aio.listen(
            address, identity=world.attested(1), expect=world.expect(0), timeout=0.1
        ) as listener:
            reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/socket")
            with pytest.raises(ChannelTimeout):
                await listener.accept()
            assert await reader.read() == b""
            writer.close()
            listener._timeout = 5
            with pytest.raises(UnavailableError):
                await aio.connect(f"unix:{tmp_path}/nobody", identity=world.attested(0), expect=world.expect(1))
            reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/socket")
            writer.write(b"\x01\0\0\0\xff\xff\xff\xff")
            with pytest.raises(HandshakeRefused):
                await listener.accept()
            assert (await reader.read())[8:] == b"malformed"
            writer.close()

    run(work())
