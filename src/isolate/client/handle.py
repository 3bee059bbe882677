"""A handle: what a user holds instead of the data.

    handle = isolate.attach("team.handle", signer=isolate.FileSigner("me.key"))
    small = handle.attenuate(operations=["classify"], uses=10)
    small.invoke("classify", image=x)

    >>> attach("/nonexistent/team.handle", signer=None)
    Traceback (most recent call last):
    ...
    isolate.errors.StorageError: cannot read /nonexistent/team.handle: No such file or directory

Mode: handle (docs/spec/capability.md); docs/handles.md is the guide. For asyncio there is ``isolate.aio``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from isolate import channel
from isolate.client.boundary import bare
from isolate.client.connect import certificate, expect_enclave
from isolate.client.handle_file import HandleFile
from isolate.client.held import Held
from isolate.client.signers import FileSigner
from isolate.crypto.signing import Signer
from isolate.messages.http import ask
from isolate.messages.invoke import Budget
from isolate.messages.receipts import UseReceipt

__all__ = ["FileSigner", "Handle", "HandleFile", "attach"]


class Handle(Held):
    """Use without seeing. ``attach`` makes it.

    Threads may share one. A forked child may use it too: it opens a channel of its own, and the parent's goes on.
    Errors leave without the frames below ``invoke``, so that no traceback shows what is in them.
    """

    __slots__ = ("_channel", "_turn")

    def __init__(self, file: HandleFile, signer: Signer) -> None:
        # One request at a time: replies come in the order of the requests, and nothing else tells them apart.
        self._turn = threading.Lock()
        self._channel: channel.Channel | None = None
        super().__init__(file, signer)

    @bare
    def invoke(self, operation: str, /, **arguments: Any) -> Any:
        """Run one operation in the enclave. Arrays travel as bytes of their own dtype.

        Raises the typed refusal with its code and request id, or a ChannelError.
        """
        return self._send(operation, self._digest(operation), arguments)

    def _send(self, operation: str, digest: bytes, arguments: dict[str, Any]) -> Any:
        encoded, hashed = self._encode(arguments)
        return self._exchange(operation, lambda binding: self._request(operation, digest, encoded, hashed, binding))

    def _exchange(self, operation: str, request: Callable[[bytes], bytes]) -> Any:
        """Send what ``request`` makes for the channel's binding; the reply's value."""
        with self._turn:
            try:
                opened = self._connect()
                opened.send(request(opened.binding))
                reply = self._reply(opened.recv())
            except BaseException:
                # This channel is over, or (interrupted) has a reply still to come, which the next use would take
                # for its own. The next one opens another.
                self.close()
                raise
        return self._value(operation, reply)

    @bare
    def invoke_joined(self, operation: str, joined: Mapping[str, Held], /, **arguments: Any) -> Any:
        """Run one operation with other handles as arguments, by the names of the arguments.

            survey.invoke_joined("compare", {"register": register}, year=1996)

        ``compare`` is an operation on this handle's asset that declares an argument ``register`` of type Joined,
        for the other's asset; both handles must name it. Each is asked and charged, and the strictest limits hold
        (docs/spec/operations.md, 7). Raises what ``invoke`` raises, and UsageError.
        """
        digest = self._digest(operation)
        self._check_joined(operation, joined, arguments)
        encoded, hashed = self._encode(arguments)
        return self._exchange(
            operation,
            lambda binding: self._request_joined(operation, digest, joined, encoded, hashed, binding),
        )

    def _connect(self) -> channel.Channel:
        if self._channel is None:
            found = certificate(self._file.service, self._owner, self._file.lineage)
            expect = expect_enclave(
                found,
                job=self._file.job,
                least_sequence=0,
                INSECURE_accept_simulated=self._file.INSECURE_accept_simulated,
            )
            holder = channel.Holder(key=self._signer)
            self._channel = channel.connect(
                self._file.enclave, identity=holder, expect=expect, profile="client", purpose="invoke"
            )
        return self._channel

    @property
    @bare
    def budget(self) -> Budget:
        """What is left, by the service: the least over this handle and those it comes from.

        It is remembered, and shown with its age by the handle's repr. Raises ServiceUnavailable, RefusedError.
        """
        found = certificate(self._file.service, self._owner, self._file.lineage)
        request = self._budget_request(found)
        return self._remember(ask(self._file.service, "budget", request, Budget, found.release_key))

    @bare
    def receipt(self, use: bytes | None = None) -> UseReceipt:
        """The service's receipt for a use that was settled; by default the last one through this object.

            handle.receipt().save("use.receipt")  # isolate log verify --receipt use.receipt finds it in the log

        ``use`` is its id (``last_use``, 32 bytes): also of one that failed after it ran, and through a handle that
        was narrowed from yours, or has ended. Where threads share a handle, the last use may be another's: attach
        one for each that wants receipts.

        Raises CapabilityRefused (``not_settled``: it stays spent; ``unknown_reservation``: also for what was spent
        from a lease), LogRefused, ServiceUnavailable, UsageError.
        """
        wanted = self._wanted(use)
        found = certificate(self._file.service, self._owner, self._file.lineage)
        request = self._receipt_request(found, wanted)
        answer = ask(self._file.service, "receipt", request, UseReceipt, found.release_key)
        return self._checked(answer, wanted, found)

    def close(self) -> None:
        """End the channel. A later use opens another."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            self._counter = 0

    def _after_fork(self) -> None:
        # In the child, where the channel's copy is over already (isolate.channel), and a thread that is not there
        # may hold the lock.
        self._turn = threading.Lock()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@bare
def attach(handle: str | os.PathLike[str] | HandleFile, *, signer: Signer) -> Handle:
    """Open a handle file, or what ``export()`` gave, with the holder's signer. Nothing is sent yet.

    Raises HolderRefused when the signer is not the token's holder, CapabilityRefused for a bad token, UsageError,
    StorageError.
    """
    return Handle(handle if isinstance(handle, HandleFile) else HandleFile.load(handle), signer)
