"""Leases as an enclave spends them: what it saves, when it ends, and for whom it is good."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from isolate.capability.invocation import Invocation, ReplayGuard, hash_arguments
from isolate.capability.scope import Scope
from isolate.capability.token import grant
from isolate.crypto import cbor
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey
from isolate.enclave.operations import Integer, Label, operation
from isolate.enclave.runtime import Server
from isolate.errors import ServiceUnavailable
from isolate.messages.base import Answer, Signed
from isolate.messages.invoke import Invoke, Reply, ReserveRequest
from isolate.messages.lease import MAX_LEASED, Lease, LeaseRequest
from isolate.messages.owner import Revoke

BINDING = b"b" * 32
HAPPENED: list[Any] = []  # what happens while ``slow`` runs


@operation(inputs={"number": Integer(0, 100)}, output=Label(101))
def echo(view: Any, number: int) -> int:
    return number


@operation(inputs={}, output=Label(10))
def failing(view: Any) -> Any:
    raise ValueError


@operation(inputs={}, output=Label(10))
def slow(view: Any) -> int:
    for happens in HAPPENED:
        happens()
    return 7


def dear(number: int) -> int:
    return 1000 * number


@operation(inputs={"number": Integer(0, 9)}, output=Label(10), price=dear)
def priced(view: Any, number: int) -> int:
    return number


OPERATIONS = [echo, failing, slow, priced]


class Client:
    def __init__(self, realm: Any, **limits: Any) -> None:
        self.key, self.counter = SigningKey.generate(), itertools.count(1)
        scope = Scope(**({"operations": {one.name: one.digest for one in OPERATIONS}} | limits))
        self.token = grant(realm.owner, asset="a/b", scope=scope, holder=self.key.verifying_key.ed25519)
        self.replay = ReplayGuard(BINDING)

    def raw(self, operation: Any, token: Any = None, **arguments: Any) -> bytes:
        token = token or self.token
        invocation = Invocation.sign(
            token, self.key, operation=operation.name, operation_digest=operation.digest,
            argument_hash=hash_arguments(cbor.encode(arguments)), channel_binding=BINDING,
            nonce=Secret.generate(16).expose().tobytes(), counter=next(self.counter),
        )  # fmt: skip
        return Invoke(token.encode(), invocation.encode(), arguments).padded()

    def ask(self, server: Server, operation: Any, token: Any = None, **arguments: Any) -> Any:
        """The result, or the code of the refusal."""
        raw = self.raw(operation, token, **arguments)
        reply = Reply.parse(server.answer(raw, BINDING, self.replay))
        return reply.code or reply.value


@pytest.fixture
def server(realm: Any, monkeypatch: pytest.MonkeyPatch) -> Server:
    realm.asset()
    workload = realm.enclave()
    # The enclave's time is the service's; here both are in the test's hand.
    monkeypatch.setattr(workload, "now", lambda: realm.clock())
    HAPPENED.clear()
    return Server(workload, "a/b", {"w": np.arange(4, dtype=np.float32)}, OPERATIONS)


@pytest.fixture
def asked(realm: Any) -> Any:
    """What the service was asked about uses, since the last call."""

    def routes() -> list[str]:
        found = [route for route, _ in realm.carried if route in ("reserve", "settle", "lease")]
        realm.carried.clear()
        return found

    routes()
    return routes


@pytest.mark.threat("BUD-11")
def test_a_lease_pays_for_as_many_uses_as_were_charged_and_not_one_more(
    realm: Any, server: Server, asked: Any
) -> None:
    client = Client(realm, uses=8, lease=4)
    assert [client.ask(server, echo, number=one) for one in range(4)] == [0, 1, 2, 3]
    assert asked() == ["lease", "settle"]
    assert [client.ask(server, echo, number=one) for one in range(4)] == [0, 1, 2, 3]
    assert asked() == ["lease", "settle"]
    assert client.ask(server, echo, number=1) == "budget_exhausted"
    assert [one["uses"] for one in realm.entries("lease")] == [4, 4]


@pytest.mark.threat("BUD-11")
def test_a_failed_use_is_spent_from_the_lease_too(realm: Any, server: Server, asked: Any) -> None:
    client = Client(realm, uses=3, lease=3)
    assert [client.ask(server, failing) for _ in range(4)] == ["operation_failed"] * 3 + ["budget_exhausted"]


@pytest.mark.threat("BUD-11")
def test_where_the_budget_has_no_lease_left_uses_are_reserved_one_by_one(
    realm: Any, server: Server, asked: Any
) -> None:
    client = Client(realm, uses=3, lease=4)
    assert [client.ask(server, echo, number=5) for _ in range(4)] == [5, 5, 5, "budget_exhausted"]
    # It is not asked for again for each of them.
    assert asked() == ["lease", *["reserve", "settle"] * 3, "reserve"]
    realm.clock.now += 60
    client.ask(server, echo, number=5)
    assert asked() == ["lease", "reserve"]


@pytest.mark.threat("BUD-10")
def test_without_the_opt_in_of_the_grant_every_use_is_asked_for(realm: Any, server: Server, asked: Any) -> None:
    plain, forbidden = Client(realm), Client(realm, lease=0)
    introduced = plain.token.attenuate(plain.key, Scope(lease=9))
    lowered = Client(realm, lease=9)
    for client, token in (
        (plain, None), (plain, introduced), (forbidden, None),
        (forbidden, forbidden.token.attenuate(forbidden.key, Scope(lease=9))),
        (lowered, lowered.token.attenuate(lowered.key, Scope(lease=0))),
    ):  # fmt: skip
        assert [client.ask(server, echo, token, number=1) for _ in range(2)] == [1, 1]
        assert asked() == ["reserve", "settle"] * 2


def test_one_use_is_no_lease_and_two_are(realm: Any, server: Server, asked: Any) -> None:
    for lease, routes in ((1, ["reserve", "settle"] * 2), (2, ["lease", "settle"])):
        client = Client(realm, lease=lease)
        assert [client.ask(server, echo, number=1) for _ in range(2)] == [1, 1]
        assert asked() == routes


@pytest.mark.threat("BUD-12")
def test_a_revoked_handle_goes_on_to_the_end_of_its_lease_and_no_longer(
    realm: Any, server: Server, asked: Any
) -> None:
    client = Client(realm, lease=100)
    assert client.ask(server, echo, number=1) == 1
    realm.tell("revoke", Revoke(client.token.id))
    realm.clock.now += 59
    assert client.ask(server, echo, number=1) == 1  # what the opt-in gives up
    realm.clock.now += 1
    assert client.ask(server, echo, number=1) == "revoked"
    assert asked() == ["lease", "settle", "lease"]


@pytest.mark.threat("BUD-12")
@pytest.mark.parametrize("revoked", [True, False])
def test_what_runs_on_after_its_lease_is_looked_at_by_the_service(
    realm: Any, server: Server, asked: Any, revoked: bool
) -> None:
    client = Client(realm, lease=100)
    assert [client.ask(server, slow) for _ in range(2)] == [7, 7]
    asked()
    HAPPENED.append(lambda: setattr(realm.clock, "now", realm.clock.now + 60))
    if revoked:
        realm.tell("revoke", Revoke(client.token.id))
    assert client.ask(server, slow) == ("revoked" if revoked else 7)
    assert asked() == (["reserve"] if revoked else ["reserve", "settle"])


@pytest.mark.threat("BUD-12")
def test_a_handle_that_expires_while_it_runs_under_a_lease(realm: Any, server: Server) -> None:
    client = Client(realm, lease=100, expires=realm.clock() + 10)
    assert client.ask(server, slow) == 7
    HAPPENED.append(lambda: setattr(realm.clock, "now", realm.clock.now + 10))
    assert client.ask(server, slow) == "expired"


@pytest.mark.threat("BUD-13")
def test_a_lease_is_good_for_one_handle_one_operation_and_one_process(
    realm: Any, server: Server, asked: Any
) -> None:
    client = Client(realm, lease=100)
    narrowed = client.token.attenuate(client.key, Scope())
    restarted = Server(server._workload, "a/b", server._view, OPERATIONS)
    for place, what, token, arguments in (
        (server, echo, None, {"number": 1}), (server, echo, narrowed, {"number": 1}), (server, slow, None, {}),
        (restarted, echo, None, {"number": 1}),
    ):  # fmt: skip
        for fresh in (["lease", "settle"], []):
            client.ask(place, what, token, **arguments)
            assert asked() == fresh


@pytest.mark.threat("BUD-13")
def test_a_lease_of_cheap_uses_pays_for_no_dear_one(realm: Any, server: Server, asked: Any) -> None:
    client = Client(realm, lease=2, bytes_out=2 * 1000 + 2 * 4000)
    codes = [client.ask(server, priced, number=number) for number in (1, 4, 1, 4, 4)]
    assert codes == [1, 4, 1, 4, "budget_exhausted"]
    assert [(one["uses"], one["bytes_out"]) for one in realm.entries("lease")] == [(2, 1000), (2, 4000)]


def test_an_enclave_asks_for_no_larger_lease_than_there_is(realm: Any, server: Server, asked: Any) -> None:
    client = Client(realm, lease=10**6)
    assert client.ask(server, echo, number=5) == 5
    assert [one["uses"] for one in realm.entries("lease")] == [MAX_LEASED]


@pytest.mark.threat("BUD-13")
def test_under_a_lease_every_invocation_is_still_checked(realm: Any, server: Server, asked: Any) -> None:
    client = Client(realm, lease=100)
    assert client.ask(server, echo, number=1) == 1
    raw = client.raw(echo, number=1)
    codes = [Reply.parse(server.answer(raw, BINDING, client.replay)).code for _ in range(2)]
    assert codes == ["", "replayed"]
    assert client.ask(server, echo, client.token.attenuate(client.key, Scope(operations={})), number=1) == (
        "scope_exceeded"
    )
    # A copy of the token does not spend from its lease: invocations are signed by its holder.
    mine = Invoke.parse(Client(realm).raw(echo, number=1))
    copied = Invoke(client.token.encode(), mine.invocation, mine.arguments).padded()
    assert Reply.parse(server.answer(copied, BINDING, ReplayGuard(BINDING))).code == "holder_refused"
    assert asked() == ["lease", "settle"]


@pytest.mark.threat("BUD-13")
def test_an_impostors_lease_pays_for_nothing(realm: Any, server: Server, asked: Any) -> None:
    """Also where the answer around it is the service's: the lease has a signature of its own, for this very use."""
    client, key = Client(realm, lease=100), realm.state.release_key

    def answering(make: Any) -> Any:
        def courier(route: str, body: bytes) -> tuple[int, bytes]:
            if route != "lease":
                return realm.serve(route, body)  # type: ignore[no-any-return]
            signed = Signed.parse(body)
            asked = LeaseRequest.parse(signed.body)
            number = Invocation.parse(asked.invocation).id
            lease = Lease(number, asked.uses, asked.bytes_out, realm.clock() + 60, 1, realm.clock())
            return 200, Answer.make(signed, make(lease), key).encode()

        return courier

    for make in (
        lambda lease: lease.sign(SigningKey.generate()),
        lambda lease: evolve(lease, invocation=bytes(32)).sign(key),
        lambda lease: evolve(lease, uses=lease.uses + 1).sign(key),
        lambda lease: evolve(lease, expires=lease.expires + 1).sign(key),
    ):
        realm.courier = answering(make)
        assert client.ask(server, echo, number=1) == "receipt_refused"
    realm.courier = realm.serve
    assert client.ask(server, echo, number=1) == 1
    assert asked() == ["lease"] * 5 + ["settle"]


@pytest.mark.threat("BUD-11")
def test_many_threads_spend_a_lease_no_further_than_one(realm: Any, server: Server, monkeypatch: Any) -> None:
    leases, key = server._leases, (b"h" * 32, "echo", 256)
    answer = Lease(b"n" * 32, 9, 256, realm.clock() + 60, 1, realm.clock())
    asked: list[Any] = []

    def lease(request: Any, number: bytes) -> Lease:
        asked.append(request)
        threading.Event().wait(0.05)  # long enough that the others come meanwhile
        return answer

    def now() -> int:
        threading.Event().wait(0.001)  # between a look at what is left and taking of it
        return int(realm.clock())

    monkeypatch.setattr(server._workload, "lease", lease)
    monkeypatch.setattr(server._workload, "now", now)
    request = ReserveRequest(b"t", b"i", bytes(32), bytes(32), 256)

    def each(work: Any) -> list[Any]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda _: work(), range(24)))

    # Of those who came while one was asked for, nobody asks for another, and nobody waits for it.
    assert each(lambda: leases.open(key, request, b"n" * 32, 9)).count(True) == len(asked) >= 1
    leases._held.clear()
    asked.clear()
    assert leases.open(key, request, b"n" * 32, 9)
    assert sum(one is not None for one in each(lambda: leases.take(key))) == 8


def test_a_lease_that_was_asked_for_too_long_ago_takes_none_from_others(
    realm: Any, server: Server, monkeypatch: Any
) -> None:
    """The first asker gives up after a minute; by then another has asked, and has a lease."""
    leases, key = server._leases, (b"h" * 32, "echo", 256)
    request = ReserveRequest(b"t", b"i", bytes(32), bytes(32), 256)

    def in_time(*_: Any) -> Lease:
        return Lease(b"n" * 32, 9, 256, realm.clock() + 60, 1, realm.clock())

    def too_late(*_: Any) -> Lease:
        realm.clock.now += 60
        monkeypatch.setattr(server._workload, "lease", in_time)
        assert leases.open(key if other is None else other, request, b"m" * 32, 9)
        raise ServiceUnavailable("no answer")

    for other in (None, (b"o" * 32, "echo", 256)):
        monkeypatch.setattr(server._workload, "lease", too_late)
        assert realm.code(lambda: leases.open(key, request, b"n" * 32, 9)) == "service_unavailable"
        assert leases.take(other or key) is not None
