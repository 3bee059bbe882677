"""Serving handles: invocations in over an attested channel, metered results out, and nothing else.

Mode: handle (docs/spec/capability.md): the user's code never sees the data.

Every invocation passes, in this order:

1. the token's chain verifies under the owner's root of the measured configuration, names this asset, and has no
   limit that is not enforced;
2. the invocation is by the token's holder, for this channel and these arguments, in the scope;
3. its counter is above every one before it on this channel;
4. the operation is registered here, under the very digest that the scope names, and its parameters are in range;
5. the service has durably charged this use, at the size of a whole padded reply, and says so in a signed receipt;
6. the result is of the operation's declared, closed type, and fits the reply that was charged.

Results and refusals alike leave as a code and a value in a reply padded to 256 bytes. When they leave tells them
apart: a refusal comes sooner.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from isolate.capability.invocation import Invocation, ReplayGuard, hash_arguments, verify_invocation
from isolate.capability.token import ChainCache, verify
from isolate.crypto import cbor
from isolate.enclave.operations import Operation
from isolate.enclave.workload import Workload
from isolate.errors import CapabilityRefused, ChannelClosed, IsolateError, OutputRefused, ScopeExceeded
from isolate.messages.base import MAX_MESSAGE
from isolate.messages.invoke import BUCKET, ENFORCED, ChargeRequest, Invoke, Reply

if TYPE_CHECKING:
    import numpy as np

    from isolate.channel import Channel, Listener

PURPOSE = "invoke"
MAX_CLIENTS = 64  # at once, those in their handshake included
IDLE = 60.0  # seconds for a handshake, and between two requests


class Server:
    """The operations of one enclave on one asset. ``view`` maps tensor names to arrays, read-only to operations."""

    def __init__(
        self,
        workload: Workload,
        asset: str,
        view: Mapping[str, np.ndarray[Any, Any]],
        operations: Sequence[Operation],
    ) -> None:
        self._workload = workload
        self._asset = asset
        self._view = MappingProxyType(dict(view))
        for array in self._view.values():
            array.flags.writeable = False
        self._operations = {operation.name: operation for operation in operations}
        self._chains = ChainCache()

    def run(self) -> None:
        """Serve clients until the process ends. A refused client ends its own channel and no other."""
        with self._workload.listen(PURPOSE, rank=None, profile="client", timeout=IDLE) as listener:
            self._workload.report("serving", asset=self._asset, operations=sorted(self._operations))
            # Each thread accepts and serves: who stays silent in a handshake keeps one of them, not the door.
            threads = [
                threading.Thread(target=self._accept, args=(listener,), daemon=True) for _ in range(MAX_CLIENTS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                channel = listener.accept()
            except ChannelClosed:
                return
            except IsolateError as error:
                self._workload.report("client_refused", code=error.code)
                continue
            self._serve(channel)

    def _serve(self, channel: Channel) -> None:
        try:
            with channel:
                self._workload.report("channel_accepted", peer_pid=peer_pid(channel))
                replay, request = ReplayGuard(channel.binding), bytearray(MAX_MESSAGE)
                while True:
                    size = channel.recv_into(request)
                    channel.send(self.answer(bytes(request[:size]), channel.binding, replay))
        except (IsolateError, OSError):
            # The client is gone, lied, or sent more than is read: its channel is over, and that is all there is.
            return

    def answer(self, message: bytes | bytearray, binding: bytes, replay: ReplayGuard) -> bytes:
        """The padded reply to one Invoke. Never raises: a failure is a code and a request id."""
        request_id = os.urandom(8).hex()
        try:
            reply = Reply("", self._invoke(Invoke.parse(bytes(message)), binding, replay), request_id).padded()
            if len(reply) > BUCKET:
                raise OutputRefused("the result is longer than the reply that was charged")
        except IsolateError as error:
            code = error.code
        except Exception:  # noqa: BLE001 (the boundary: an exception carries data)
            code = "operation_failed"
        else:
            return reply
        self._workload.report("invocation_refused", code=code, request_id=request_id)
        return Reply(code, None, request_id).padded()

    def _invoke(self, request: Invoke, binding: bytes, replay: ReplayGuard) -> Any:
        owner = self._workload.configuration.owner.ed25519
        token = verify(request.token, owner, now=self._workload.now(), cache=self._chains)
        if token.asset != self._asset:
            raise ScopeExceeded("this token is for another asset")
        token.scope.require_enforced(ENFORCED)
        arguments = hash_arguments(cbor.encode(request.arguments))
        invocation = verify_invocation(
            Invocation.parse(request.invocation), token, channel_binding=binding, argument_hash=arguments
        )
        replay.admit(invocation)
        operation = self._operations.get(invocation.operation)
        if operation is None or operation.digest != invocation.operation_digest:
            raise CapabilityRefused("no such operation runs here", code="unknown_operation")
        token.scope.check_arguments(operation.name, request.arguments)
        charge = ChargeRequest(request.token, request.invocation, binding, arguments, BUCKET)
        self._workload.charge(charge, invocation.id)
        return operation.run(self._view, request.arguments)


def peer_pid(channel: Channel) -> int:
    """The process at the other end of a Unix socket, as the kernel vouches for it; 0 for other sockets."""
    with socket.socket(fileno=os.dup(channel.fileno())) as end:
        if end.family != socket.AF_UNIX:
            return 0
        pid: int = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid
