"""Handles for asyncio: what Handle does, awaited; cancelled tasks, and other event loops."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isolate
from isolate.capability.invocation import Invocation
from isolate.client.signers import AgentSigner
from isolate.crypto.signing import SigningKey
from isolate.errors import BudgetExhausted, ChannelError, HolderRefused, MalformedError, ScopeExceeded, UsageError
from isolate.messages.invoke import Invoke, Reply


def test_it_has_the_names_of_the_handle_that_blocks() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names(isolate.aio.AsyncHandle) == names(isolate.Handle)


def test_using(house: Any, key: SigningKey, agent: Any, tmp_path: Path) -> None:
    house.grant(key, uses=9).save(tmp_path / "team.handle")

    async def use() -> None:
        signer = AgentSigner(agent(key).address)
        async with await isolate.aio.attach(tmp_path / "team.handle", signer=signer) as handle:
            assert await handle.invoke("op", image=np.zeros(4, np.uint8)) == 4
            assert (await handle.budget).uses == 9
            assert "all of 9 uses left" in repr(handle)
            with pytest.raises(ScopeExceeded):
                await handle.invoke("none")
            with pytest.raises(UsageError):
                await handle.invoke("op", number=1.5)
            async with handle.attenuate(uses=1) as small:
                assert small.scope.uses == 1 and await small.invoke("op", number=1) == 1
            house.answer = lambda _: Reply("budget_exhausted", None, "request-1")
            with pytest.raises(BudgetExhausted) as refused:
                await handle.invoke("op", number=1)
            assert refused.value.request_id == "request-1"
        with pytest.raises(HolderRefused):
            await isolate.aio.attach(handle.export(), signer=SigningKey.generate())

    asyncio.run(use())
    assert house.channels == 2


@pytest.mark.threat("HND-7")
def test_tasks_get_each_its_own_reply(house: Any, key: SigningKey) -> None:
    async def use() -> list[Any]:
        async with await isolate.aio.attach(house.grant(key), signer=key) as handle:
            return await asyncio.gather(*(handle.invoke("op", number=number) for number in range(20)))

    assert asyncio.run(use()) == list(range(20))
    assert house.channels == 1


@pytest.mark.threat("HND-7")
def test_a_cancelled_task_leaves_no_reply_for_the_next(house: Any, key: SigningKey) -> None:
    async def use() -> Any:
        arrived, go, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

        def slow(request: Invoke) -> Reply:
            loop.call_soon_threadsafe(arrived.set)
            go.wait(10)
            return house.echo(request)  # type: ignore[no-any-return]

        async with await isolate.aio.attach(house.grant(key), signer=key) as handle:
            house.answer = slow
            task = asyncio.create_task(handle.invoke("op", number=1))
            await arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            house.answer = house.echo
            go.set()
            return await handle.invoke("op", number=2)

    assert asyncio.run(use()) == 2
    assert house.channels == 2


def test_after_a_channel_ended_the_next_use_opens_another(house: Any, key: SigningKey) -> None:
    async def use() -> None:
        async with await isolate.aio.attach(house.grant(key), signer=key) as handle:
            assert await handle.invoke("op", number=1) == 1

            class Odd:
                def padded(self) -> bytes:
                    return b"no reply"

            house.answer = lambda _: Odd()
            with pytest.raises(MalformedError):
                await handle.invoke("op", number=2)

            def hang_up(_: Any) -> Any:
                raise ChannelError("gone")

            house.answer = hang_up
            with pytest.raises(ChannelError):
                await handle.invoke("op", number=3)
            counters = []

            def counted(request: Invoke) -> Reply:
                counters.append(Invocation.parse(request.invocation).counter)
                return house.echo(request)  # type: ignore[no-any-return]

            house.answer = counted
            assert [await handle.invoke("op", number=number) for number in (4, 5)] == [4, 5]
            assert counters == [1, 2]

    asyncio.run(use())
    assert house.channels == 3


def test_a_loop_that_was_closed_in_the_middle_of_a_use_is_left_behind(house: Any, key: SigningKey) -> None:
    """As in a notebook, where a cell was interrupted, and its loop closed with a task in it."""
    arrived, go = threading.Event(), threading.Event()

    def slow(request: Invoke) -> Reply:
        arrived.set()
        go.wait(10)
        return house.echo(request)  # type: ignore[no-any-return]

    house.answer = slow
    loop = asyncio.new_event_loop()
    handle = loop.run_until_complete(isolate.aio.attach(house.grant(key), signer=key))
    task = loop.create_task(handle.invoke("op", number=1))
    loop.run_until_complete(asyncio.wait_for(asyncio.to_thread(arrived.wait, 10), 10))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    house.answer = house.echo
    go.set()
    assert asyncio.run(handle.invoke("op", number=2)) == 2
    assert not task.done()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    asyncio.run(handle.close())


def test_another_event_loop_gets_another_channel(house: Any, key: SigningKey) -> None:
    handle = asyncio.run(isolate.aio.attach(house.grant(key), signer=key))

    async def use(number: int) -> Any:
        return await asyncio.gather(*(handle.invoke("op", number=number) for _ in range(3)))

    assert [asyncio.run(use(number)) for number in (1, 2)] == [[1] * 3, [2] * 3]
    asyncio.run(handle.close())
    assert house.channels == 2
