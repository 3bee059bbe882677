"""The same channels under asyncio: messages, cancellation, back-pressure, timeouts, closing while waiting."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from isolate import channel
from isolate.channel import aio
from isolate.errors import ChannelClosed, ChannelTimeout, ChannelTruncated, HandshakeRefused, UsageError

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
        async with linked(timeout=0.2) as (one, other):
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
