"""Handles: what it costs to authorise a use, to meter it, and to have it committed before its reply leaves.

authorize_per_s and authorize_cached_per_s: tokens of two blocks and their invocations that one thread verifies a
second, with the chain verified anew and from the cache. invoke_added_ms: one use of an operation that does nothing,
signed by its holder, sent over an attested channel to another process, reserved and settled by `isolate serve` with
full sync, less a bare round trip of messages of the same sizes over the same channel.
invoke_uncommitted_vs_channel_rpc: the same use without the service, over a remote call on that channel: the same
two messages, encoded and read on both sides, with nothing signed or verified. invoke_uncommitted_vs_channel_bytes:
over the bare round trip, in which nothing is encoded either. lease_use_vs_committed: how many times cheaper a use
is under a lease of 64 than one that is reserved and settled, both from the client's signature to its reply, and the
lease's own cost shared among its uses. sibling_contention: the time of a charge (reserve and settle) when 8 clients
narrowed one handle, over that of one client alone. Of round trips each round takes the median, but for those of
leases the mean. false_refusals: of authorisations while every core is busy with something else; 100,000 of them, or
2,000 with --quick.

    >>> desk = Desk(lambda reserve, number: None, lambda settle, number: None)
    >>> desk.report("nothing")
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from isolate.capability.invocation import Invocation, ReplayGuard, hash_arguments, verify_invocation
from isolate.capability.scope import Scope
from isolate.capability.token import ChainCache, Token, grant, verify
from isolate.channel import Channel, connect, listen
from isolate.cli.bench import Figures, paired
from isolate.cli.bench.lines import attested_pair, keep_to, kept_to, two_cores
from isolate.cli.bench.service import ASSET, Load, served
from isolate.client.owner import Owner
from isolate.crypto import cbor
from isolate.crypto.signing import SigningKey, VerifyingKey
from isolate.enclave.operations import Label, Operation, operation
from isolate.enclave.replies import fit
from isolate.enclave.runtime import Server
from isolate.errors import IsolateError, UnavailableError
from isolate.messages.attest import ServiceCertificate
from isolate.messages.invoke import (
    BUCKET,
    Invoke,
    Receipt,
    Reply,
    Reservation,
    ReserveRequest,
    SettleRequest,
)
from isolate.messages.lease import Lease, LeaseRequest

CLIENTS = 8
LEASE = 64  # uses, as in docs/handles.md
NOW = 1_800_000_000
UNDER_LOAD, QUICK = 100_000, 2_000


@operation(inputs={}, output=Label(2))
def nothing(view: Any) -> int:
    return 1


class Desk:
    """What a Server needs of a workload, with the two steps of a charge handed in, and what gives leases."""

    def __init__(
        self,
        reserve: Callable[[ReserveRequest, bytes], None],
        settle: Callable[[SettleRequest, bytes], None],
        owner: VerifyingKey | None = None,
        certificate: ServiceCertificate | None = None,
        lease: Callable[[LeaseRequest, bytes], Lease] | None = None,
    ) -> None:
        self.reserve, self.settle, self.lease = reserve, settle, lease
        self.owner, self.certificate = owner, certificate

    @property
    def configuration(self) -> Desk:
        """What of it a Server reads: the owner's root."""
        return self

    @staticmethod
    def now() -> int:
        return int(time.time())

    def report(self, name: str, **facts: Any) -> None:
        """Nothing is said: an event would be measured too."""


class Caller:
    """A holder with a token for ``nothing``, narrowed once, of this ``epoch`` of the service."""

    def __init__(
        self,
        owner_key: SigningKey,
        parent: Token | None = None,
        giver: SigningKey | None = None,
        epoch: int = 1,
        lease: int | None = None,
    ) -> None:
        self.key = SigningKey.generate()
        self._giver = giver or SigningKey.generate()
        if parent is None:
            scope = Scope(operations={nothing.name: nothing.digest}, uses=2**40, lease=lease)
            holder = self._giver.verifying_key.ed25519
            parent = grant(owner_key, asset=ASSET, scope=scope, holder=holder, epoch=epoch)
        self.parent = parent
        self.token = parent.attenuate(self._giver, Scope(), self.key.verifying_key.ed25519)
        self.encoded = self.token.encode()
        self.counter = 0

    def sibling(self) -> Caller:
        """Another holder, whose handle comes from the same one."""
        return Caller(self.key, self.parent, self._giver)

    def invocation(self, binding: bytes) -> Invocation:
        self.counter += 1
        return Invocation.sign(
            self.token, self.key, operation=nothing.name, operation_digest=nothing.digest,
            argument_hash=hash_arguments(cbor.encode({})), channel_binding=binding,
            nonce=secrets.token_bytes(16), counter=self.counter,
        )  # fmt: skip

    def message(self, binding: bytes) -> bytes:
        return Invoke(self.encoded, self.invocation(binding).encode(), {}).padded()


def authorise(caller: Caller, owner: bytes, calls: list[Invocation], cache: ChainCache | None) -> int:
    """Verify chain and invocation of each call; how many were refused."""
    refused, hashed = 0, hash_arguments(cbor.encode({}))
    for call in calls:
        try:
            seen = verify(caller.encoded, owner, now=NOW, cache=cache)
            verify_invocation(call, seen, channel_binding=call.channel_binding, argument_hash=hashed)
        except IsolateError:
            refused += 1
    return refused


def _rates(rounds: int, count: int) -> Figures:
    owner = SigningKey.generate()
    caller, cache = Caller(owner), ChainCache()
    calls = [caller.invocation(bytes(32)) for _ in range(count)]
    seen: dict[str, list[float]] = {"authorize_per_s": [], "authorize_cached_per_s": []}
    for _ in range(rounds):
        for name, held in (("authorize_per_s", None), ("authorize_cached_per_s", cache)):
            begin = time.perf_counter()
            if authorise(caller, owner.verifying_key.ed25519, calls, held):
                raise UnavailableError("the benchmark refused what it made itself")
            seen[name].append(count / (time.perf_counter() - begin))
    return {name: round(statistics.median(values), 1) for name, values in seen.items()}


def _spin(stop: Any) -> None:
    while not stop.is_set():
        sum(range(10_000))


def _false_refusals(count: int) -> int:
    """Refusals of what is valid, while every core is busy: nothing here may depend on how long it took."""
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    burners = [context.Process(target=_spin, args=(stop,), daemon=True) for _ in range(os.cpu_count() or 1)]
    for burner in burners:
        burner.start()
    try:
        owner = SigningKey.generate()
        caller, cache = Caller(owner), ChainCache()
        calls, public = [caller.invocation(bytes(32)) for _ in range(1000)], owner.verifying_key.ed25519
        # A tenth of them with the chain verified anew.
        return sum(
            authorise(caller, public, calls, cache if turn % 10 else None) for turn in range(count // len(calls))
        )
    finally:
        stop.set()
        for burner in burners:
            burner.join(5)


def _serve(
    identity: Any, expect: Any, address: str, servers: dict[str, Server], load: Load, pipe: Connection
) -> None:
    """The enclave's process: answers so many messages in the way that the pipe says."""
    with listen(address, identity=identity, expect=expect, purpose="bench") as listener:
        pipe.send("listening")
        channel = listener.accept()
    replay, request = ReplayGuard(channel.binding), bytearray(1 << 20)
    keep_to(two_cores()[1:])

    def answer(kind: str, message: bytes) -> bytes:
        if kind == "echo":
            return bytes(BUCKET)
        if kind == "rpc":
            Invoke.parse(message)
            return fit("", 1, "0" * 16, BUCKET)
        return servers[kind].answer(message, channel.binding, replay)

    while True:
        try:
            kind, count = pipe.recv()
        except EOFError:
            return
        if kind in ("metered", "leased"):
            load.attest()  # a result lives five minutes, which a benchmark on a busy machine outlives
        pipe.send("ready")
        for _ in range(count):
            size = channel.recv_into(request)
            channel.send(answer(kind, bytes(request[:size])))


class Client:
    """Round trips over one attested channel to the enclave's process. ``lender`` may have leases taken."""

    def __init__(self, channel: Channel, caller: Caller, lender: Caller, pipe: Connection) -> None:
        self._channel, self._caller, self._lender, self._pipe = channel, caller, lender, pipe
        self._size = len(caller.message(channel.binding))
        self._signed = caller.invocation(channel.binding).encode()

    def median(self, kind: str, count: int) -> float:
        """Seconds."""
        return statistics.median(self.trips(kind, count))

    def trips(self, kind: str, count: int) -> list[float]:
        """Seconds of each of ``count``, with client and enclave on a core of its own each."""
        with kept_to(two_cores()[:1]):
            return self._trips(kind, count)

    def _trips(self, kind: str, count: int) -> list[float]:
        self._pipe.send((kind, count))
        self._pipe.recv()
        times, bare = [], bytes(self._size)
        for _ in range(count):
            begin = time.perf_counter()
            if kind == "echo":
                self._channel.send(bare)
                self._channel.recv()
            else:
                self._channel.send(self._message(kind))
                reply = Reply.parse(bytes(self._channel.recv()))
                if reply.code:
                    raise UnavailableError(f"the benchmark's use was refused: {reply.code}")
            times.append(time.perf_counter() - begin)
        return times

    def _message(self, kind: str) -> bytes:
        if kind == "rpc":
            return Invoke(self._caller.encoded, self._signed, {}).padded()
        caller = self._lender if kind == "leased" else self._caller
        caller.counter = max(self._caller.counter, self._lender.counter)  # on one channel it only grows
        return caller.message(self._channel.binding)


@contextlib.contextmanager
def _client(folder: Path, owner: Owner, key: SigningKey, load: Load) -> Iterator[Client]:
    def reserve(request: ReserveRequest, number: bytes) -> None:
        load.ask("reserve", request, Reservation).verify(owner.certificate, number)

    def settle(request: SettleRequest, number: bytes) -> None:
        load.ask("settle", request, Receipt).verify(owner.certificate, request)

    def lease(request: LeaseRequest, number: bytes) -> Lease:
        taken = load.ask("lease", request, Lease)
        taken.verify(owner.certificate, number, request)
        return taken

    def server(reserve: Callable[..., None], settle: Callable[..., None]) -> Server:
        operations: list[Operation] = [nothing]
        desk: Any = Desk(reserve, settle, key.verifying_key, owner.certificate, lease)
        return Server(desk, ASSET, {"w": np.zeros(4)}, operations)

    servers = {
        "metered": server(reserve, settle),
        "leased": server(reserve, settle),
        "free": server(lambda request, number: None, lambda request, number: None),
    }
    first, second, expect = attested_pair()
    here, there = multiprocessing.Pipe()
    address = f"unix:{folder}/enclave"
    process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(second, expect(0), address, servers, load, there), daemon=True
    )
    process.start()
    there.close()
    try:
        here.recv()
        with connect(address, identity=first, expect=expect(1), purpose="bench") as channel:
            epoch = owner.certificate.epoch
            yield Client(channel, Caller(key, epoch=epoch), Caller(key, epoch=epoch, lease=LEASE), here)
    finally:
        here.close()
        process.join(5)
        process.terminate()


def _charges(loads: list[Load], callers: list[Caller], count: int) -> float:
    """Seconds a charge, reserve and settle, of ``count`` by each of the callers at once."""

    def work(load: Load, caller: Caller) -> None:
        for _ in range(count):
            call = caller.invocation(bytes(32))
            body = ReserveRequest(caller.encoded, call.encode(), bytes(32), call.argument_hash, BUCKET)
            load.ask("reserve", body, Reservation)
            load.ask("settle", SettleRequest(call.id, BUCKET, ""), Receipt)

    for load in loads:
        load.attest()
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(callers)) as pool:
        list(pool.map(work, loads, callers))  # raises what one of them raised
    return (time.perf_counter() - begin) / (count * len(callers))


def run(rounds: int | None, quick: bool) -> tuple[int, Figures]:
    """The figures: 9 rounds, or 3 with ``quick``."""
    rounds = rounds or (3 if quick else 9)
    trips, charges = (20, 4) if quick else (100, 20)
    figures = _rates(rounds, 200 if quick else 2000)
    with tempfile.TemporaryDirectory(prefix="isolate-bench-", dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        with served(folder) as (owner, address, root, _):
            loads = [Load(owner, address, root, rank) for rank in range(CLIENTS + 1)]
            key = SigningKey.load(folder / "owner.key")
            one = Caller(key, epoch=owner.certificate.epoch)
            siblings = [one, *(one.sibling() for _ in range(CLIENTS - 1))]
            with _client(folder, owner, key, loads[-1]) as client:
                added: list[float] = []

                def metered() -> float:
                    times = client.trips("metered", trips)
                    # Against the bare round trip of the same minute.
                    added.append((statistics.median(times) - client.median("echo", trips)) * 1000)
                    return statistics.fmean(times)

                measures: dict[str, Callable[[], float]] = {
                    "metered": metered,
                    # Whole leases, each from its beginning to its last use.
                    "leased": lambda: statistics.fmean(client.trips("leased", LEASE if quick else 4 * LEASE)),
                    "free": lambda: client.median("free", trips * 5),
                    "rpc": lambda: client.median("rpc", trips * 5),
                    "echo": lambda: client.median("echo", trips * 5),
                    "alone": lambda: _charges(loads[:1], siblings[:1], charges * 2),
                    "together": lambda: _charges(loads[:-1], siblings, charges),
                }
                for measure in measures.values():  # once beforehand: caches and buffers
                    measure()
                added.clear()
                ratios = {
                    "invoke_uncommitted_vs_channel_rpc": ("free", "rpc"),
                    "invoke_uncommitted_vs_channel_bytes": ("free", "echo"),
                    "lease_use_vs_committed": ("metered", "leased"),
                    "sibling_contention": ("together", "alone"),
                }
                figures |= paired(rounds, measures, ratios)
    figures["invoke_added_ms"] = round(statistics.median(added), 3)
    figures["false_refusals"] = float(_false_refusals(QUICK if quick else UNDER_LOAD))
    return rounds, figures
