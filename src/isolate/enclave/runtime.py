"""Serving handles: invocations in over an attested channel, metered results out, and nothing else.

Mode: handle (docs/spec/capability.md): the user's code never sees the data.

Every invocation passes, in this order:

1. the token's chain verifies under the owner's root of the measured configuration, names this asset, and has no
   limit that is not enforced;
2. the invocation is by the token's holder, for this channel and these arguments, in the scope;
3. its counter is above every one before it on this channel;
4. the operation is registered here, under the very digest that the scope names, its arguments are of their types
   and in range, and the scope allows its type of output and can have its minimum group;
5. the service has durably reserved this use, at its worst case in bytes, and says so in a signed reservation;
6. the result is of the operation's declared, closed type;
7. the service has settled the use, and found no handle of the chain revoked meanwhile, and says so in a signed
   receipt for this very size and code.

Results and refusals alike leave as a code and a value in a reply of the one size that the operation has. When they
leave tells them apart: a refusal comes sooner. Spec: docs/spec/operations.md.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from isolate.capability.invocation import (
    Invocation,
    ReplayGuard,
    VerifiedInvocation,
    hash_arguments,
    verify_invocation,
)
from isolate.capability.token import ChainCache, verify
from isolate.crypto import cbor
from isolate.crypto.kdf import Label, derive
from isolate.crypto.secret import Secret
from isolate.enclave.derived import Derivations
from isolate.enclave.operations import Derived, Operation
from isolate.enclave.replies import fit
from isolate.enclave.view import View
from isolate.enclave.workload import Workload
from isolate.errors import CapabilityRefused, ChannelClosed, IsolateError, ScopeExceeded
from isolate.messages.base import MAX_MESSAGE
from isolate.messages.invoke import BUCKET, ENFORCED, Invoke, ReserveRequest, SettleRequest

if TYPE_CHECKING:
    import numpy as np

    from isolate.channel import Channel, Listener

PURPOSE = "invoke"
MAX_CLIENTS = 64  # at once, those in their handshake included
IDLE = 60.0  # seconds for a handshake, and between two requests


@frozen
class _Admitted:
    """A use that passed checks 1 to 4; what it would cost is not yet reserved."""

    invocation: VerifiedInvocation
    operation: Operation
    decoded: dict[str, Any]
    request: ReserveRequest


class Server:
    """The operations of one enclave on one asset. ``view`` maps tensor names to arrays, read-only to operations.

    ``minimum_group``: distinct entities behind every aggregate, by the wish of whoever owns the asset. 0 is no such
    wish, and leaves it to operations and tokens.
    """

    def __init__(
        self,
        workload: Workload,
        asset: str,
        view: Mapping[str, np.ndarray[Any, Any]],
        operations: Sequence[Operation],
        *,
        minimum_group: int = 0,
    ) -> None:
        self._workload = workload
        self._asset = asset
        self._view = View(view)
        self._operations = {operation.name: operation.under(minimum_group) for operation in operations}
        self._chains = ChainCache()
        self._seeds = Secret.generate(32)
        self._derived = Derivations(workload, asset)

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
        request_id, size = os.urandom(8).hex(), BUCKET
        try:
            request = Invoke.parse(bytes(message))
            claimed = Invocation.parse(request.invocation)
            # By what it claims, before anything is checked: a refusal is as long as the result would have been.
            if claimed.operation in self._operations:
                size = self._operations[claimed.operation].reply_size
            return self._use(self._admit(request, claimed, binding, replay), request_id)
        except IsolateError as error:
            # Of a refusal by the service the client is told the service's number: its owner can explain that.
            code, told = error.code, error.request_id or ""
            request_id = told if len(told) == len(request_id) and told.isascii() else request_id
        except Exception:  # noqa: BLE001 (the boundary: an exception carries data)
            code = "operation_failed"
        self._workload.report("invocation_refused", code=code, request_id=request_id)
        return fit(code, None, request_id, size)

    def _admit(self, request: Invoke, claimed: Invocation, binding: bytes, replay: ReplayGuard) -> _Admitted:
        owner = self._workload.configuration.owner.ed25519
        epoch = self._workload.certificate.epoch
        token = verify(request.token, owner, now=self._workload.now(), epoch=epoch, cache=self._chains)  # 1
        if token.asset != self._asset:
            raise ScopeExceeded("this token is for another asset")
        token.scope.require_enforced(ENFORCED)
        arguments = hash_arguments(cbor.encode(request.arguments))
        invocation = verify_invocation(claimed, token, channel_binding=binding, argument_hash=arguments)  # 2
        replay.admit(invocation)  # 3
        operation = self._operations.get(invocation.operation)  # 4
        if operation is None or operation.digest != invocation.operation_digest:
            raise CapabilityRefused("no such operation runs here", code="unknown_operation")
        token.scope.check_arguments(operation.name, request.arguments)
        decoded = operation.decode(request.arguments)
        cost = operation.cost(decoded)
        # The declared type is what counts, at its greatest: so that what is refused here says nothing of the data.
        token.scope.check_output(operation.output.kind, *operation.output.sizes())
        operation = operation.under(token.scope.minimum_group or 0)
        views = {
            name: self._derived.view(value, token)
            for name, value in decoded.items()
            if isinstance(operation.inputs[name], Derived)
        }
        return _Admitted(
            invocation,
            operation,
            decoded | views,
            ReserveRequest(request.token, request.invocation, binding, arguments, cost),
        )

    def _use(self, use: _Admitted, request_id: str) -> bytes:
        """Reserve, run, settle; then the reply, of a result or of a refusal that was charged as well."""
        number, size = use.invocation.id, use.operation.reply_size
        self._workload.reserve(use.request, number)  # 5
        try:
            code, reply = "", fit("", self._perform(use), request_id, size)  # 6
        except IsolateError as error:
            code = error.code
        except Exception:  # noqa: BLE001 (the boundary: an exception carries data)
            code = "operation_failed"
        # Nothing is given back: the reply is as long as was reserved, whatever is in it.
        self._workload.settle(SettleRequest(number, use.request.bytes_out, code), number)  # 7
        if code:
            self._workload.report("invocation_refused", code=code, request_id=request_id)
            return fit(code, None, request_id, size)
        return reply

    def _perform(self, use: _Admitted) -> Any:
        given = {}
        if use.operation.seeded:
            with derive(self._seeds, Label.OPERATION_SEED, use.invocation.id, use.operation.digest) as seed:
                given["seed"] = bytes(seed.expose())
        with contextlib.ExitStack() as lending:
            view = lending.enter_context(self._view.lent())
            # Of a derived asset too the operation gets a view for this invocation only.
            decoded = {
                name: lending.enter_context(value.lent()) if isinstance(value, View) else value
                for name, value in use.decoded.items()
            }
            result = use.operation.run(view, decoded, **given)
            if isinstance(use.operation.output, Derived):
                return self._derived.seal(use.invocation, result)
            return result


def peer_pid(channel: Channel) -> int:
    """The process at the other end of a Unix socket, as the kernel vouches for it; 0 for other sockets."""
    with socket.socket(fileno=os.dup(channel.fileno())) as end:
        if end.family != socket.AF_UNIX:
            return 0
        pid: int = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid
