"""Handles for asyncio: the same names as ``isolate.attach`` and ``isolate.Handle``, awaited.

    handle = await isolate.aio.attach("team.handle", signer=isolate.AgentSigner("unix:/run/user/1000/isolate"))
    async with handle:
        label = await handle.invoke("classify", image=x)
        left = await handle.budget

    >>> import asyncio
    >>> asyncio.run(attach("/nonexistent/team.handle", signer=None))
    Traceback (most recent call last):
    ...
    isolate.errors.StorageError: cannot read /nonexistent/team.handle: No such file or directory

Invocations of one handle wait for one another; several handles run at once. The signer is asked in the event loop's
thread: a key file takes a twentieth of a millisecond, an agent little more. Mode: handle.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Self

from isolate.channel import Holder, aio
from isolate.client.boundary import bare_async
from isolate.client.connect import certificate, expect_enclave
from isolate.client.handle_file import HandleFile
from isolate.client.held import Held
from isolate.crypto.signing import Signer
from isolate.messages.http import ask
from isolate.messages.invoke import Budget
from isolate.messages.receipts import UseReceipt

__all__ = ["AsyncHandle", "attach"]


class AsyncHandle(Held):
    """A Handle whose ``invoke``, ``budget`` and ``close`` are awaited. ``aio.attach`` makes it.

    A task that is cancelled in the middle of an invocation ends the channel, and the next use opens another; so
    does use from another event loop, and from a forked child, which needs a loop of its own.
    """

    __slots__ = ("_channel", "_loop", "_turn")

    def __init__(self, file: HandleFile, signer: Signer) -> None:
        self._channel: aio.Channel | None = None
        self._turn = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(file, signer)

    @bare_async
    async def invoke(self, operation: str, /, **arguments: Any) -> Any:
        """Run one operation in the enclave, as ``Handle.invoke``."""
        digest = self._digest(operation)
        encoded, hashed = self._encode(arguments)
        return await self._exchange(
            operation, lambda binding: self._request(operation, digest, encoded, hashed, binding)
        )

    async def _exchange(self, operation: str, request: Callable[[bytes], bytes]) -> Any:
        """As ``Handle._exchange``."""
        await self._here()
        async with self._turn:
            try:
                opened = await self._connect()
                await opened.send(request(opened.binding))
                reply = self._reply(await opened.recv())
            except BaseException:
                # Over; or, where this task was cancelled, with a reply to come that the next use would take.
                await self.close()
                raise
        return self._value(operation, reply)

    @bare_async
    async def invoke_joined(self, operation: str, joined: Mapping[str, Held], /, **arguments: Any) -> Any:
        """Run one operation with other handles as arguments, as ``Handle.invoke_joined``."""
        digest = self._digest(operation)
        self._check_joined(operation, joined, arguments)
        encoded, hashed = self._encode(arguments)
        return await self._exchange(
            operation,
            lambda binding: self._request_joined(operation, digest, joined, encoded, hashed, binding),
        )

    async def _here(self) -> None:
        """A channel and a lock belong to one event loop: those of another are left behind."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._turn, self._loop = asyncio.Lock(), loop
            await self.close()

    async def _connect(self) -> aio.Channel:
        if self._channel is None:
            file = self._file
            found = await asyncio.to_thread(certificate, file.service, self._owner, file.lineage)
            expect = expect_enclave(
                found,
                job=file.job,
                least_sequence=0,
                INSECURE_accept_simulated=file.INSECURE_accept_simulated,
            )
            holder = Holder(key=self._signer)
            self._channel = await aio.connect(
                file.enclave, identity=holder, expect=expect, profile="client", purpose="invoke"
            )
        return self._channel

    @property
    def budget(self) -> Coroutine[Any, Any, Budget]:
        """What is left, as ``Handle.budget``: ``await handle.budget``."""
        return self._ask_budget()

    @bare_async
    async def _ask_budget(self) -> Budget:
        found = await asyncio.to_thread(certificate, self._file.service, self._owner, self._file.lineage)
        request = self._budget_request(found)
        return self._remember(
            await asyncio.to_thread(ask, self._file.service, "budget", request, Budget, found.release_key)
        )

    @bare_async
    async def receipt(self, use: bytes | None = None) -> UseReceipt:
        """The service's receipt for a use that was settled, as ``Handle.receipt``."""
        wanted = self._wanted(use)
        found = await asyncio.to_thread(certificate, self._file.service, self._owner, self._file.lineage)
        request = self._receipt_request(found, wanted)
        answer = await asyncio.to_thread(ask, self._file.service, "receipt", request, UseReceipt, found.release_key)
        return self._checked(answer, wanted, found)

    async def close(self) -> None:
        """End the channel. A later use opens another."""
        if self._channel is not None:
            opened, self._channel, self._counter = self._channel, None, 0
            await opened.close()

    def _after_fork(self) -> None:
        # Another process has another loop: what belongs to the parent's is dropped when it is first used here.
        self._loop = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@bare_async
async def attach(handle: str | os.PathLike[str] | HandleFile, *, signer: Signer) -> AsyncHandle:
    """As ``isolate.attach``, for asyncio. Raises HolderRefused, CapabilityRefused, UsageError, StorageError."""
    if isinstance(handle, HandleFile):
        return AsyncHandle(handle, signer)
    return AsyncHandle(await asyncio.to_thread(HandleFile.load, handle), signer)
