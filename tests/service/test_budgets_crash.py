"""A service that is killed at every statement of reserve, lease and settle: budget is lost at most, never minted.

The service runs in a process of its own, on the state of the realm, and ends itself with SIGKILL right before its
n-th statement, for every n; after the last one it is killed between its commit and its answer.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from isolate.crypto import merkle
from isolate.crypto.signing import SigningKey
from isolate.messages.base import Signed
from isolate.messages.invoke import Budget, Reservation, ReserveRequest, SettleRequest
from isolate.messages.lease import Lease, LeaseRequest
from isolate.service.routes import Service
from isolate.service.state import State

SIZE, NEEDED = 800, 300  # bytes reserved, and bytes that then leave
LEASED = 8  # uses


class Deadly:
    """A database that kills its process before the n-th statement."""

    def __init__(self, database: Any, step: int) -> None:
        self._database, self._left = database, step

    def execute(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._database.execute(*arguments)

    def close(self) -> None:
        self._database.close()


def killed(realm: Any, route: str, request: Signed, step: int) -> bool:
    """Ask once, of a service that dies at this step; whether it came as far as its answer."""
    realm.state.close()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            state = State(realm.folder / "state", unlock=realm.unlock, clock=realm.clock)
            service = Service(state)
            state._database = Deadly(state._database, step)  # type: ignore[assignment]
            if service.answer(route, request.encode())[0] == 200:
                os.write(tell, b"answered")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(tell)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    answered = os.read(told, 16) == b"answered"
    os.close(told)
    realm.open()
    return answered


def each_step(
    realm: Any, route: str, make: Callable[[], Signed], check: Callable[[Signed, bool], None], by: int
) -> int:
    """Kill at step 1, 1 + by, ... until one comes as far as its answer; how many steps there were."""
    step, answered = 1, False
    while not answered:
        request = make()
        answered = killed(realm, route, request, step)
        check(request, answered)
        step += by
        assert step < 200
    return step


def check_log(realm: Any) -> None:
    """Every entry is in the tree, and the tree has no other."""
    with realm.state.transaction() as database:
        nodes, size = realm.service.log.tree(database)
        entries = [bytes(row[0]) for row in database.execute("SELECT public FROM entry ORDER BY idx")]
        again = merkle.MemoryStore()
        merkle.extend(again, 0, entries)
        assert len(entries) == size
        assert merkle.root(nodes, size) == merkle.root(again, size)


def reserve_killed(realm: Any, till: Any, holder: SigningKey, by: int, leased: int = 1) -> int:
    token = realm.grant(holder, uses=10_000, bytes_out=10**9, lease=LEASED)
    route, kind, answer = ("reserve", "use", Reservation) if leased == 1 else ("lease", "lease", Lease)
    uses: dict[bytes, ReserveRequest | LeaseRequest] = {}

    def make() -> Signed:
        use = realm.use(token, holder, bytes_out=SIZE)
        if leased > 1:
            use = LeaseRequest(
                use.token, use.invocation, use.channel_binding, use.argument_hash, use.bytes_out, leased
            )
        signed: Signed = realm.signed_by(till.enclave, use)
        uses[signed.nonce] = use
        return signed

    def left(charged: int) -> Budget:
        return Budget(10_000 - charged * leased, 10**9 - charged * leased * SIZE)

    spent = 0

    def check(request: Signed, answered: bool) -> None:
        nonlocal spent
        written = len(realm.entries(kind))
        # All of it or none of it, and all of it where it was answered.
        assert written in ((spent + 1,) if answered else (spent, spent + 1))
        assert till.left(token, holder) == left(written)
        assert realm.rows()["reservation"] == written
        # Asked again, it is not taken twice: what was written is replayed, what was not is reserved now.
        again = realm.signed_by(till.enclave, uses[request.nonce])
        code = realm.code(lambda: realm.ask(route, again, answer))
        assert code == ("replayed" if written > spent else "")
        spent += 1
        assert till.left(token, holder) == left(spent)
        check_log(realm)

    return each_step(realm, route, make, check, by)


def lease_killed(realm: Any, till: Any, holder: SigningKey, by: int) -> int:
    """All the uses of it, or none."""
    return reserve_killed(realm, till, holder, by, LEASED)


def settle_killed(realm: Any, till: Any, holder: SigningKey, by: int) -> int:
    token = realm.grant(holder, bytes_out=10**9)
    out = 0

    def make() -> Signed:
        number = till.reserve(realm.use(token, holder, bytes_out=SIZE)).invocation
        signed: Signed = realm.signed_by(till.enclave, SettleRequest(number, NEEDED, ""))
        return signed

    def check(request: Signed, answered: bool) -> None:
        nonlocal out
        written = len(realm.entries("settled"))
        left = 10**9 - till.left(token, holder).bytes_out
        assert left in ((out + NEEDED,) if answered else (out + NEEDED, out + SIZE))
        number = SettleRequest.parse(request.body).invocation
        code = realm.code(lambda: till.settle(number, NEEDED))
        assert code == ("replayed" if left == out + NEEDED else "")
        assert len(realm.entries("settled")) == written + (code == "")
        out += NEEDED
        assert 10**9 - till.left(token, holder).bytes_out == out
        check_log(realm)

    return each_step(realm, "settle", make, check, by)


@pytest.mark.threat("SVC-21")
@pytest.mark.parametrize("run", [reserve_killed, lease_killed, settle_killed])
def test_a_kill_at_some_statements_loses_at_most_what_was_reserved(
    realm: Any, till: Any, holder: SigningKey, run: Any
) -> None:
    assert run(realm, till, holder, 6) > 15


@pytest.mark.slow
@pytest.mark.threat("SVC-21")
@pytest.mark.parametrize("run", [reserve_killed, lease_killed, settle_killed])
def test_a_kill_at_every_statement_loses_at_most_what_was_reserved(
    realm: Any, till: Any, holder: SigningKey, run: Any
) -> None:
    assert run(realm, till, holder, 1) > 15
