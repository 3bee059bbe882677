"""Several assets in one operation: a handle on each, each charged, and the strictest of their limits."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from isolate.capability.invocation import Invocation, ReplayGuard
from isolate.capability.scope import Range
from isolate.client.aio import AsyncHandle
from isolate.client.handle import Handle
from isolate.client.handle_file import HandleFile
from isolate.crypto import cbor
from isolate.crypto.signing import SigningKey
from isolate.enclave.operations import Aggregates, Count, Derived, Integer, Joined, Label, Rows, operation
from isolate.enclave.runtime import Server
from isolate.errors import BudgetExhausted, CapabilityRefused, ScopeExceeded, UsageError
from isolate.messages.invoke import Invoke
from isolate.messages.owner import Revoke

PEOPLE = Aggregates(("low", "high"), {"people": Count()}, 2)
RAN: list[Callable[..., Any]] = []


@operation(inputs={"register": Joined("c/d"), "limit": Integer(0, 9)}, output=PEOPLE)
def compare(view: Any, register: Any, limit: int) -> Any:
    """Those who stand in both tables, by whether they are above the limit."""
    for one in RAN:
        one(view, register)
    both = np.isin(view["id"], register["id"])
    return Rows(view["id"][both], (view["score"][both] > limit).astype(int))


@operation(inputs={"register": Joined("c/d")}, output=Label(2))
def other(view: Any, register: Any) -> int:
    return 1


class Wire:
    """A channel to a server, over which a test can change what is said."""

    binding = b"b" * 32

    def __init__(self, server: Server) -> None:
        self.server, self.guard, self.answers = server, ReplayGuard(self.binding), list[bytes]()
        self.change: Callable[[Invoke], Invoke] = lambda message: message

    def send(self, message: bytes) -> None:
        said = self.change(Invoke.parse(message)).padded()
        self.answers.append(self.server.answer(said, self.binding, self.guard))

    def recv(self) -> bytearray:
        return bytearray(self.answers.pop())

    def close(self) -> None:
        pass


class AsyncWire(Wire):
    async def send(self, message: bytes) -> None:  # type: ignore[override]
        super().send(message)

    async def recv(self) -> bytearray:  # type: ignore[override]
        return super().recv()


class Cast:
    def __init__(self, realm: Any) -> None:
        for asset in ("a/b", "c/d"):
            realm.asset(asset)
        survey = {"id": np.arange(10), "score": np.arange(10)}
        self.realm = realm
        server = Server(
            realm.enclave(), "a/b", survey, [compare, other], joined={"c/d": {"id": np.arange(4, 20)}}
        )  # fmt: skip
        self.server = server
        RAN.clear()

    def handle(
        self, asset: str, operations: Any = (compare, other), kind: Any = Handle, wire: Any = Wire, **limits: Any
    ) -> Any:
        key = SigningKey.generate()
        granted = {one.name: one.digest for one in operations}
        token = self.realm.grant(key, asset, operations=granted, **limits)
        owner = str(self.realm.owner.verifying_key)
        handle = kind(HandleFile(token.to_text(), owner, "acme", "unix:/s", "unix:/e", "acme/job", True), key)
        handle._channel = wire(self.server)
        return handle

    def compare(self, survey: Handle, register: Handle, limit: int = 6) -> Any:
        return survey.invoke_joined("compare", {"register": register}, limit=limit)

    def code(self, *handles: Handle, **more: Any) -> str:
        found: str = self.realm.code(lambda: self.compare(*handles, **more))
        return found

    def used(self) -> list[str]:
        return [one["asset"] for one in self.realm.entries("settled")]


@pytest.fixture
def cast(realm: Any) -> Cast:
    return Cast(realm)


@pytest.mark.threat("AGG-4", "AGG-6")
def test_each_asset_is_charged_and_the_strictest_of_its_limits_holds(cast: Cast) -> None:
    survey, register = cast.handle("a/b"), cast.handle("c/d", uses=4)
    assert cast.compare(survey, register) == [[3], [3]]
    assert cast.used() == ["c/d", "a/b"]
    strict = cast.handle("c/d", minimum_group=4)
    assert cast.compare(survey, strict) == [None, None]
    assert cast.compare(cast.handle("a/b", minimum_group=4), register) == [None, None]
    assert cast.compare(survey, strict, limit=5) == [None, [4]]
    narrow = cast.handle("c/d", parameters={"compare": {"limit": Range(0, 3)}})
    assert cast.code(survey, narrow) == "scope_exceeded"
    assert cast.code(survey, cast.handle("c/d", outputs={"vector": (1, 99)})) == "scope_exceeded"
    assert [cast.code(survey, register) for _ in range(3)] == ["", "", "budget_exhausted"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_an_operation_kept_of_its_views_is_empty(cast: Cast, fails: bool) -> None:
    survey, register, kept = cast.handle("a/b"), cast.handle("c/d"), list[Any]()
    RAN.append(lambda *views: kept.append((views, [len(one) for one in views])) or (fails and 1 / 0))
    for _ in range(2):
        assert cast.code(survey, register) == ("operation_failed" if fails else "")
    assert [seen for _, seen in kept] == [[2, 1], [2, 1]]
    assert [len(view) for views, _ in kept for view in views] == [0, 0, 0, 0]


@pytest.mark.threat("AGG-6")
def test_a_handle_that_is_revoked_or_spent_ends_what_it_is_joined_to(cast: Cast) -> None:
    survey, register = cast.handle("a/b"), cast.handle("c/d")
    RAN.append(lambda *views: cast.realm.tell("revoke", Revoke(register.id)))
    assert cast.code(survey, register) == "revoked"  # while it ran
    RAN.clear()
    RAN.append(lambda *views: pytest.fail("it ran"))
    assert cast.code(survey, register) == "revoked"
    assert cast.code(survey, cast.handle("c/d", uses=0)) == "budget_exhausted"
    assert cast.code(cast.handle("a/b", uses=0), cast.handle("c/d")) == "budget_exhausted"
    assert cast.used() == []


@pytest.mark.threat("AGG-6")
def test_a_joined_handle_is_used_once_for_this_operation_channel_and_arguments(cast: Cast) -> None:
    survey, register = cast.handle("a/b"), cast.handle("c/d")
    seen: list[dict[str, Any]] = []
    wire: Any = survey._channel

    def look(message: Invoke) -> Invoke:
        seen.append(message.arguments["register"])
        return message

    wire.change = look
    assert cast.code(survey, register) == ""
    honest, counter = seen[0], itertools.count(1000)

    def forged(**changes: Any) -> dict[str, Any]:
        fields = {
            "operation": "compare", "operation_digest": compare.digest, "channel_binding": Wire.binding,
            "nonce": b"n" * 16, "counter": next(counter), "argument_hash": register._encode({"limit": 6})[1],
        }  # fmt: skip
        invocation = Invocation.sign(register._token, register._signer, **(fields | changes))
        return {"token": honest["token"], "invocation": invocation.encode()}

    stranger = cast.handle("c/d")
    for value, code in (
        (honest, "replayed"),
        (forged(argument_hash=register._encode({"limit": 5})[1]), "holder_refused"),
        (forged(channel_binding=b"x" * 32), "holder_refused"),
        (forged(operation="other", operation_digest=other.digest), "holder_refused"),
        (forged(operation_digest=bytes(32)), "scope_exceeded"),
        (forged() | {"token": stranger._token.encode()}, "holder_refused"),
        (forged() | {"token": cast.handle("a/b")._token.encode()}, "scope_exceeded"),
        ({"token": honest["token"]}, "bad_argument"),
        (b"", "bad_argument"),
    ):
        # The first holder signs whatever stands there: it is the other's proof that fails.
        encoded = {"limit": 6, "register": value}
        hashed = survey._encode(encoded)[1]
        survey._counter = next(counter)
        wire.change = lambda message: message
        wire.send(survey._request("compare", compare.digest, encoded, hashed, Wire.binding))
        assert survey._reply(wire.recv()).code == code
    # Nor can a courier in the client change the other's part under the first one's proof.
    wire.change = lambda message: evolve(message, arguments=message.arguments | {"register": forged()})
    assert cast.code(survey, register) == "holder_refused"
    assert cast.used() == ["c/d", "a/b"]
    # The service would refuse some of these as well; here they do not even reach it.
    assert [route for route, _ in cast.realm.carried].count("reserve") == 2


def test_the_same_for_asyncio(cast: Cast) -> None:
    async def use() -> Any:
        survey = cast.handle("a/b", kind=AsyncHandle, wire=AsyncWire)
        survey._loop = asyncio.get_running_loop()
        register, spent = cast.handle("c/d"), cast.handle("c/d", uses=0)
        found = [await survey.invoke_joined("compare", {"register": register}, limit=6) for _ in range(2)]
        with pytest.raises(BudgetExhausted):
            await survey.invoke_joined("compare", {"register": spent}, limit=6)
        with pytest.raises(UsageError):
            await survey.invoke_joined("compare", {}, limit=6)
        return found

    assert asyncio.run(use()) == [[[3], [3]]] * 2
    assert cast.used() == ["c/d", "a/b"] * 2


def test_declarations_and_calls_that_are_none(cast: Cast) -> None:
    def derive(view: Any, register: Any) -> Any:
        return {}

    with pytest.raises(UsageError, match="one handle only"):
        operation(inputs={"register": Joined("c/d")}, output=Derived())(derive)
    with pytest.raises(UsageError):
        Server(cast.server._workload, "a/b", {}, [compare])
    survey, register = cast.handle("a/b"), cast.handle("c/d")
    opened = survey._channel
    for joined in ({"limit": register}, {}):
        with pytest.raises(UsageError):
            survey.invoke_joined("compare", joined, limit=3)
    with pytest.raises(ScopeExceeded):
        survey.invoke_joined("compare", {"register": cast.handle("c/d", operations=[other])}, limit=3)
    assert survey._channel is opened  # nothing was sent, so nothing has to end
    with pytest.raises(CapabilityRefused):
        survey.invoke("compare", limit=3)
    assert cbor.encode(Joined("c/d").schema()) != cbor.encode(Joined("a/b").schema())


@pytest.mark.threat("BUD-11")
def test_a_lease_pays_for_no_use_of_several_handles(cast: Cast) -> None:
    """Else the other asset's handle would be used for nothing."""
    survey, register = cast.handle("a/b", lease=50), cast.handle("c/d", uses=2, lease=50)
    assert [cast.code(survey, register) for _ in range(3)] == ["", "", "budget_exhausted"]
    assert not cast.realm.entries("lease")
    assert sorted(cast.used()) == ["a/b", "a/b", "c/d", "c/d"]
