"""Derived assets: what an operation makes hangs on the handle it was made through, and dies with it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import sealed
from isolate.capability.invocation import Invocation, ReplayGuard, hash_arguments
from isolate.capability.scope import Scope
from isolate.capability.token import Token
from isolate.crypto import cbor
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey
from isolate.enclave.operations import Derived, Integer, Label, operation
from isolate.enclave.runtime import Server
from isolate.errors import UsageError
from isolate.messages.attest import Registered
from isolate.messages.derive import DeriveRequest, derived_name
from isolate.messages.invoke import Invoke, Reply, SettleRequest
from isolate.messages.owner import Revoke

BINDING = b"b" * 32


@operation(inputs={"add": Integer(0, 50)}, output=Derived())
def finetune(view: Any, add: int) -> Any:
    return {"w": view["w"] + np.float32(add)}


@operation(inputs={"model": Derived(), "add": Integer(0, 50)}, output=Derived())
def again(view: Any, model: Any, add: int) -> Any:
    return {"w": model["w"] + np.float32(add)}


@operation(inputs={"model": Derived()}, output=Label(1000))
def total(view: Any, model: Any) -> int:
    return int(model["w"].sum())


OPERATIONS = [finetune, again, total]
GRANTED = {one.name: one.digest for one in OPERATIONS}


class Person:
    """A holder of keys; each use goes over a channel with the same binding, with the token that is given."""

    def __init__(self) -> None:
        self.key, self.counter = SigningKey.generate(), itertools.count(1)
        self.guard = ReplayGuard(BINDING)

    @property
    def public(self) -> bytes:
        return self.key.verifying_key.ed25519

    def ask(self, server: Server, token: Token, operation: Any, **arguments: Any) -> Reply:
        invocation = Invocation.sign(
            token, self.key, operation=operation.name, operation_digest=operation.digest,
            argument_hash=hash_arguments(cbor.encode(arguments)), channel_binding=BINDING,
            nonce=Secret.generate(16).expose().tobytes(), counter=next(self.counter),
        )  # fmt: skip
        raw = server.answer(Invoke(token.encode(), invocation.encode(), arguments).padded(), BINDING, self.guard)
        assert len(raw) == operation.reply_size
        return Reply.parse(raw)


@pytest.fixture
def serve(realm: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Server]:
    """Makes enclaves that serve a/b, whose w is 1, 2, 3, 4."""
    monkeypatch.setenv("ISOLATE_ASSETS", str(realm.folder))
    realm.asset()
    ranks = itertools.count()
    tensors = {"w": np.arange(4, dtype=np.float32) + 1}
    return lambda: Server(realm.enclave(rank=next(ranks)), "a/b", tensors, OPERATIONS)


def test_what_is_made_is_used_through_the_handle_that_made_it(realm: Any, serve: Callable[[], Server]) -> None:
    server, team, analyst = serve(), Person(), Person()
    token = realm.grant(team.key, operations=GRANTED, uses=6)
    reference = team.ask(server, token, finetune, add=10).value
    assert reference["handle"] == token.id
    assert set(reference) == {"asset", "digest", "handle"}
    assert team.ask(server, token, total, model=reference).value == 50
    narrowed = token.attenuate(team.key, Scope(uses=2), analyst.public)
    assert analyst.ask(server, narrowed, total, model=reference).value == 50
    # Another enclave of the same measurement, after a restart say, has the service release it.
    assert analyst.ask(serve(), narrowed, total, model=reference).value == 50
    assert realm.entries("release")[-1]["asset"] == reference["asset"]
    # Each of these was a use of the one handle, of the analyst's and of the asset.
    assert analyst.ask(server, narrowed, total, model=reference).code == "budget_exhausted"
    more = team.ask(server, token, again, model=reference, add=10).value
    assert team.ask(server, token, total, model=more).value == 90
    assert team.ask(server, token, total, model=more).code == "budget_exhausted"
    assert realm.entries("derive")[0]["parent"] == "a/b"


@pytest.mark.threat("ENC-36")
def test_revoking_the_handle_kills_what_was_made_through_it(realm: Any, serve: Callable[[], Server]) -> None:
    server, team, analyst = serve(), Person(), Person()
    token = realm.grant(team.key, operations=GRANTED)
    narrowed = token.attenuate(team.key, Scope(), analyst.public)
    child = analyst.ask(server, narrowed, finetune, add=1).value
    grandchild = analyst.ask(server, narrowed, again, model=child, add=1).value
    realm.tell("revoke", Revoke(token.id))
    for reference in (child, grandchild):
        assert analyst.ask(server, narrowed, total, model=reference).code == "revoked"
    # Nor does any enclave get its keys again, whoever's handle it is.
    fresh = serve()._workload
    for reference in (child, grandchild):
        path = fresh.locate(reference["asset"])
        code = realm.code(lambda path=path: sealed.load_file(path, identity=fresh))
        assert code == "revoked"
    # Not even where the owner sets a rule for it by its name.
    realm.rule(child["asset"], readers=("reader",))
    assert realm.code(lambda: sealed.load_file(fresh.locate(child["asset"]), identity=fresh)) == "revoked"


@pytest.mark.threat("ENC-37")
def test_a_reference_is_no_right(realm: Any, serve: Callable[[], Server]) -> None:
    """Somebody else's handle on the same asset, an ancestor's, a stranger's reference changed to one's own."""
    server, team, analyst, other = serve(), Person(), Person(), Person()
    token = realm.grant(team.key, operations=GRANTED)
    narrowed = token.attenuate(team.key, Scope(), analyst.public)
    sibling = token.attenuate(team.key, Scope(), other.public)
    child = analyst.ask(server, narrowed, finetune, add=1).value
    # From here on it is open in this enclave, and in the other one it is not.
    assert analyst.ask(server, narrowed, total, model=child).value == 14
    used, held = len(realm.entries("use")), ((team, token), (other, sibling))
    for enclave in (server, serve()):
        for person, mine in held:
            assert person.ask(enclave, mine, total, model=child).code == "scope_exceeded"
    for name in ("c/d", "a/b", "a/b/derived/../../c", "a/b/derived/" + "0" * 31, "x/derived/" + "0" * 32, ""):
        assert analyst.ask(server, narrowed, total, model={**child, "asset": name}).code == "scope_exceeded"
    assert len(realm.entries("use")) == used  # none of them was worth a use
    # What only the file itself can say is seen when the use is paid for.
    for enclave in (server, serve()):
        for person, mine in held:
            changed = {**child, "handle": mine.id}
            assert person.ask(enclave, mine, total, model=changed).code == "scope_exceeded"
    assert analyst.ask(serve(), narrowed, total, model={**child, "digest": bytes(32)}).code == "rolled_back"
    spent, released = token.attenuate(team.key, Scope(uses=0)), len(realm.entries("release"))
    assert team.ask(serve(), spent, total, model={**child, "handle": spent.id}).code == "budget_exhausted"
    assert len(realm.entries("release")) == released


@pytest.mark.threat("ENC-38")
def test_a_host_that_swaps_what_was_made_is_refused(realm: Any, serve: Callable[[], Server]) -> None:
    server, team = serve(), Person()
    token = realm.grant(team.key, operations=GRANTED)
    one, two = (team.ask(server, token, finetune, add=add).value for add in (1, 2))
    fresh = serve()
    locate = fresh._workload.locate
    shutil.copyfile(locate(two["asset"]), locate(one["asset"]))
    assert team.ask(fresh, token, total, model=one).code == "rolled_back"
    # Nor with the client's help: the file says itself what it is called.
    assert team.ask(fresh, token, total, model={**one, "digest": two["digest"]}).code == "scope_exceeded"
    Path(locate(one["asset"])).unlink()
    assert team.ask(fresh, token, total, model=one).code == "storage"
    assert team.ask(fresh, token, total, model=two).value == 18


def test_four_are_held_open_and_the_one_that_was_not_used_goes(realm: Any, serve: Callable[[], Server]) -> None:
    server, team = serve(), Person()
    token = realm.grant(team.key, operations=GRANTED)
    made = [team.ask(server, token, finetune, add=add).value for add in range(6)]

    def use(*which: int) -> int:
        """How many of them the service has to release again."""
        before = len(realm.entries("release"))
        assert [team.ask(server, token, total, model=made[one]).value for one in which] == [
            10 + 4 * n for n in which
        ]
        return len(realm.entries("release")) - before

    assert [use(0, 1, 2, 3), use(0, 1, 2, 3), use(0, 4), use(0, 2, 3, 4), use(1)] == [4, 0, 1, 0, 1]
    assert len(server._derived._open) == 4


def test_an_asset_whose_name_leaves_no_room_for_a_derived_one(serve: Callable[[], Server]) -> None:
    """Else its uses would be charged, sealed and registered before the reply turns out too short."""
    workload = serve()._workload
    for name in ("é" * 43 + "a", "a" * 87):
        Server(workload, name, {}, [finetune])
    for name in ("é" * 44, "a" * 88):
        Server(workload, name, {}, [total])
        with pytest.raises(UsageError, match="too long"):
            Server(workload, name, {}, [total, finetune])


@pytest.mark.threat("ENC-39")
def test_an_enclave_derives_only_in_a_use_of_its_own_that_is_under_way(realm: Any, serve: Any) -> None:
    """What hangs on which handle is the service's to say, from the reservation."""
    one, two, team = serve()._workload, serve()._workload, Person()
    token = realm.grant(team.key, operations={"op": b"d" * 32})
    uses = [realm.use(token, team.key, counter=number) for number in range(3)]
    numbers = [Invocation.parse(use.invocation).id for use in uses]
    tensors = {"w": np.ones(1, np.float32)}

    def derive(workload: Any, name: str, number: bytes) -> Registered:
        made: Registered = workload.derive(name, tensors, invocation=number, metadata={})
        return made

    def code(*arguments: Any) -> str:
        found: str = realm.code(lambda: derive(*arguments))
        return found

    name = derived_name("a/b", numbers[0])
    assert code(one, name, numbers[0]) == "unknown_reservation"  # not reserved at all
    for use, number in zip(uses, numbers, strict=True):
        one.reserve(use, number)
    assert code(two, name, numbers[0]) == "unknown_reservation"  # by another instance
    for other in ("a/b", "c/d", derived_name("c/d", numbers[0]), derived_name("a/b", numbers[1])):
        assert code(one, other, numbers[0]) == "unauthenticated_origin"
    foreign = realm.seal(name, sign=two._signing)
    facts = sealed.public_facts(foreign)
    request = DeriveRequest(numbers[0], name, facts.header, facts.directory)
    assert realm.code(lambda: one._ask("derive", request, Registered)) == "unauthenticated_origin"
    realm.rule("a/b")
    assert code(one, name, numbers[0]) == "rule_denied"
    realm.rule("a/b", readers=("reader",))
    assert derive(one, name, numbers[0]).asset == name
    assert code(one, name, numbers[0]) == "rolled_back"  # one use makes one asset
    one.settle(SettleRequest(numbers[1], 256, ""), numbers[1])
    assert code(one, derived_name("a/b", numbers[1]), numbers[1]) == "unknown_reservation"  # settled
    realm.tell("revoke", Revoke(token.id))
    assert code(one, derived_name("a/b", numbers[2]), numbers[2]) == "revoked"
    assert len(realm.entries("derive")) == 1


@pytest.mark.threat("BUD-12")
def test_no_lease_where_a_derived_asset_is_made_or_used(realm: Any, serve: Any) -> None:
    """An open one is kept in memory: only the service knows that its handle was revoked meanwhile."""
    server, person = serve(), Person()
    token = realm.grant(person.key, operations=GRANTED, lease=50)
    tuned = person.ask(server, token, finetune, add=1).value
    assert person.ask(server, token, finetune, add=2).code == ""
    assert [person.ask(server, token, total, model=tuned).value for _ in range(2)] == [14, 14]
    realm.tell("revoke", Revoke(token.id))
    assert person.ask(server, token, total, model=tuned).code == "revoked"
    assert not realm.entries("lease")
