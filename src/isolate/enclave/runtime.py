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
   where other assets are joined to this one, under a handle on each of them too, which passed 1 to 4 likewise.
   Or it is spent from a lease, for which the service did so, and which is good now;
6. the result is of the operation's declared, closed type;
7. the service has settled the use, and found no handle of the chain revoked meanwhile, and says so in a signed
   receipt for this very size and code. Or the lease that it was spent from is still good.

Results and refusals alike leave as a code and a value in a reply of the one size that the operation has. When they
leave tells them apart: a refusal comes sooner. Spec: docs/spec/operations.md.
"""

from __future__ import annotations

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
from isolate.capability.token import ChainCache, VerifiedToken, verify
from isolate.crypto import cbor
from isolate.crypto.kdf import Label, derive
from isolate.crypto.secret import Secret
from isolate.enclave import boot
from isolate.enclave.derived import Derivations
from isolate.enclave.leases import Leases
from isolate.enclave.operations import Derived, Joined, Operation
from isolate.enclave.refusals import Refusals
from isolate.enclave.replies import fit
from isolate.enclave.view import View
from isolate.enclave.workload import Workload
from isolate.errors import CapabilityRefused, ChannelClosed, HolderRefused, IsolateError, ScopeExceeded, UsageError
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
    """A use that passed checks 1 to 4; what it would cost is not yet reserved.

    ``reserved``: what to reserve for each of its handles, by the id of the invocation; its own is the last.
    """

    invocation: VerifiedInvocation
    operation: Operation
    decoded: dict[str, Any]
    reserved: dict[bytes, ReserveRequest]


class Server:
    """The operations of one enclave on one asset. ``view`` maps tensor names to arrays, read-only to operations.

    ``minimum_group``: distinct entities behind every aggregate, by the wish of whoever owns the asset, or of the
    strictest where there are several. 0 is no such wish, and leaves it to operations and tokens. ``joined``: other
    assets, by name, that operations take as arguments of type Joined.
    """

    def __init__(
        self,
        workload: Workload,
        asset: str,
        view: Mapping[str, np.ndarray[Any, Any]],
        operations: Sequence[Operation],
        *,
        minimum_group: int = 0,
        joined: Mapping[str, Mapping[str, np.ndarray[Any, Any]]] | None = None,
    ) -> None:
        self._workload = workload
        self._asset = asset
        self._view = View(view)
        self._joined = {name: View(tensors) for name, tensors in (joined or {}).items()}
        self._operations = {operation.name: operation.under(minimum_group) for operation in operations}
        if len(self._operations) < len(operations):
            raise UsageError("two operations have one name")
        inputs = [kind for operation in operations for kind in operation.inputs.values()]
        named = {kind.asset for kind in inputs if isinstance(kind, Joined)}
        if missing := named - self._joined.keys():
            raise UsageError(f"operations join assets that are not here: {', '.join(sorted(missing))}")
        self._chains = ChainCache()
        self._seeds = Secret.generate(32)
        makes = any(isinstance(operation.output, Derived) for operation in operations)
        self._derived = Derivations(workload, asset, makes=makes)
        self._leases = Leases(workload)
        self._refusals = Refusals(workload)

    def run(self) -> None:
        """Serve clients until the process ends. A refused client ends its own channel and no other.

        From now on the process prints nothing but events.
        """
        boot.only_events()
        with self._workload.listen(PURPOSE, rank=None, profile="client", timeout=IDLE) as listener:
            self._workload.report("serving", asset=self._asset, operations=sorted(self._operations))
            threading.Thread(target=self._refusals.run, daemon=True).start()
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
        token, admitted = b"", False
        try:
            request = Invoke.parse(bytes(message))
            token = request.token
            claimed = Invocation.parse(request.invocation)
            # By what it claims, before anything is checked: a refusal is as long as the result would have been.
            if claimed.operation in self._operations:
                size = self._operations[claimed.operation].reply_size
            use = self._admit(request, claimed, binding, replay)
            admitted = True
            return self._use(use, request_id)
        except IsolateError as error:
            # Of a refusal by the service the client is told the service's number: its owner can explain that.
            code, told = error.code, error.request_id or ""
            request_id = told if len(told) == len(request_id) and told.isascii() else request_id
        except Exception:  # noqa: BLE001 (the boundary: an exception carries data)
            code = "operation_failed"
        self._workload.report("invocation_refused", code=code, request_id=request_id)
        if not admitted:
            # Of what was admitted the service knows.
            self._note(token, code)
        return fit(code, None, request_id, size)

    def _note(self, token: bytes, code: str) -> None:
        try:
            grant = self._chain(token).handles[0]
        except IsolateError:
            grant = token = b""
        self._refusals.note(grant, token, code)

    def _admit(self, request: Invoke, claimed: Invocation, binding: bytes, replay: ReplayGuard) -> _Admitted:
        hashed = hash_arguments(cbor.encode(request.arguments))
        invocation = self._verified(request.token, claimed, self._asset, binding, hashed)  # 1, 2
        replay.admit(invocation)  # 3
        operation = self._operations.get(invocation.operation)  # 4
        if operation is None or operation.digest != invocation.operation_digest:
            raise CapabilityRefused("no such operation runs here", code="unknown_operation")
        decoded = operation.decode(request.arguments)
        cost = operation.cost(decoded)
        joined = {name: kind for name, kind in operation.inputs.items() if isinstance(kind, Joined)}
        plain = {name: value for name, value in request.arguments.items() if name not in joined}
        reserved, views = dict[bytes, ReserveRequest](), dict[str, View]()
        for name, kind in sorted(joined.items()):
            token, part = decoded[name]["token"], decoded[name]["invocation"]
            bound = hash_arguments(cbor.encode(plain))
            other = self._verified(token, Invocation.parse(part), kind.asset, binding, bound)
            if (other.operation, other.operation_digest) != (operation.name, operation.digest):
                raise HolderRefused("the joined handle was used for another operation")
            replay.admit(other)
            operation = self._limited(operation, other, plain)
            reserved[other.id] = ReserveRequest(token, part, binding, bound, cost)
            views[name] = self._joined[kind.asset]
        operation = self._limited(operation, invocation, request.arguments)
        for name in _derived_inputs(operation):
            self._derived.check(decoded[name], invocation.token)
        reserved[invocation.id] = ReserveRequest(request.token, request.invocation, binding, hashed, cost)
        return _Admitted(invocation, operation, decoded | views, reserved)

    def _verified(
        self, token: bytes, claimed: Invocation, asset: str, binding: bytes, hashed: bytes
    ) -> VerifiedInvocation:
        """Checks 1 and 2, for one of the handles of a use."""
        verified = self._chain(token)  # 1
        if verified.asset != asset:
            raise ScopeExceeded("this token is for another asset")
        verified.scope.require_enforced(ENFORCED)
        return verify_invocation(claimed, verified, channel_binding=binding, argument_hash=hashed)  # 2

    def _chain(self, token: bytes) -> VerifiedToken:
        owner, epoch = self._workload.configuration.owner.ed25519, self._workload.certificate.epoch
        return verify(token, owner, now=self._workload.now(), epoch=epoch, cache=self._chains)

    @staticmethod
    def _limited(operation: Operation, invocation: VerifiedInvocation, arguments: dict[str, Any]) -> Operation:
        """What the scope of one of the handles says of arguments, output and groups: part of check 4."""
        scope = invocation.token.scope
        scope.check_arguments(operation.name, arguments)
        # The declared type is what counts, at its greatest: so that what is refused here says nothing of the data.
        scope.check_output(operation.output.kind, *operation.output.sizes())
        return operation.under(scope.minimum_group or 0)

    def _use(self, use: _Admitted, request_id: str) -> bytes:
        """Reserve, run, settle; then the reply, of a result or of a refusal that was charged as well."""
        size = use.operation.reply_size
        leased = self._lease(use)  # 5
        try:
            code, reply = "", fit("", self._perform(use), request_id, size)  # 6
        except IsolateError as error:
            code = error.code
        except Exception:  # noqa: BLE001 (the boundary: an exception carries data)
            code = "operation_failed"
        # Nothing is given back: the reply is as long as was reserved, whatever is in it.
        if leased is not None and not self._leases.good(leased):  # 7
            # The lease ended meanwhile: the use is paid for once more, and settled like any other.
            self._reserve(use)
            leased = None
        for number, request in use.reserved.items() if leased is None else ():
            self._workload.settle(SettleRequest(number, request.bytes_out, code), number)
        if code:
            self._workload.report("invocation_refused", code=code, request_id=request_id)
            return fit(code, None, request_id, size)
        return reply

    def _lease(self, use: _Admitted) -> int | None:
        """Check 5: the end of the lease that the use was spent from; None where it is reserved itself."""
        token, operation = use.invocation.token, use.operation
        derived = isinstance(operation.output, Derived) or _derived_inputs(operation)
        # One use is no lease. Several handles, and what hangs on a handle, are the service's to look at each time.
        if token.lease < 2 or len(use.reserved) > 1 or derived:
            self._reserve(use)
            return None
        request = use.reserved[use.invocation.id]
        key = (token.id, operation.name, request.bytes_out)
        leased = self._leases.take(key)
        if leased is None and not self._leases.open(key, request, use.invocation.id, token.lease):
            self._reserve(use)
        return leased

    def _reserve(self, use: _Admitted) -> None:
        for number, request in use.reserved.items():
            self._workload.reserve(request, number)

    def _perform(self, use: _Admitted) -> Any:
        given = {}
        if use.operation.seeded:
            with derive(self._seeds, Label.OPERATION_SEED, use.invocation.id, use.operation.digest) as seed:
                given["seed"] = bytes(seed.expose())
        lent = [self._view.lent()]
        try:
            decoded = dict(use.decoded)
            # Only now, when the use is paid for: opening one costs the service a release.
            for name in _derived_inputs(use.operation):
                decoded[name] = self._derived.view(decoded[name], use.invocation.token)
            # Of a derived or joined asset too the operation gets a view for this invocation only.
            for name, value in decoded.items():
                if isinstance(value, View):
                    decoded[name] = value.lent()
                    lent.append(decoded[name])
            result = use.operation.run(lent[0], decoded, **given)
            if isinstance(use.operation.output, Derived):
                return self._derived.seal(use.invocation, result)
            return result
        finally:
            for view in lent:
                view.close()


def _derived_inputs(operation: Operation) -> list[str]:
    return [name for name, kind in operation.inputs.items() if isinstance(kind, Derived)]


def peer_pid(channel: Channel) -> int:
    """The process at the other end of a Unix socket, as the kernel vouches for it; 0 for other sockets."""
    with socket.socket(fileno=os.dup(channel.fileno())) as end:
        if end.family != socket.AF_UNIX:
            return 0
        pid: int = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid
