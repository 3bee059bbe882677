"""What an enclave refuses by itself stands in the log: for the owner's grant, and in its logarithm."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest

from isolate.capability.invocation import Invocation, ReplayGuard, hash_arguments
from isolate.capability.scope import Scope
from isolate.capability.token import Token
from isolate.crypto import cbor
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey
from isolate.enclave.operations import Integer, Label, operation
from isolate.enclave.refusals import Refusals
from isolate.enclave.runtime import Server
from isolate.errors import MalformedError, ServiceUnavailable
from isolate.messages.base import Signed
from isolate.messages.invoke import Invoke, Noted, RefusalReport, Reply, ReserveRequest

BINDING = b"b" * 32
KIND = "invocation refused"


@operation(inputs={"number": Integer(0, 100)}, output=Label(101))
def echo(view: Any, number: int) -> int:
    return number


class Door:
    """An enclave that serves ``echo`` on a/b, a holder of a grant on it, and everybody's replies."""

    def __init__(self, realm: Any) -> None:
        realm.asset()
        self.realm, self.enclave, self.key = realm, realm.enclave(), SigningKey.generate()
        self.server = Server(self.enclave, "a/b", {"w": np.zeros(1)}, [echo])
        self.token = realm.grant(self.key, operations={"echo": echo.digest})
        self._counter, self._replay = itertools.count(1), ReplayGuard(BINDING)

    def request(self, token: Token | None = None, key: SigningKey | None = None, **changes: Any) -> bytes:
        arguments = changes.pop("arguments", {"number": 1})
        fields: dict[str, Any] = {
            "operation": "echo", "operation_digest": echo.digest, "channel_binding": BINDING,
            "argument_hash": hash_arguments(cbor.encode(arguments)),
            "nonce": Secret.generate(16).expose().tobytes(), "counter": next(self._counter),
        }  # fmt: skip
        token = token or self.token
        invocation = Invocation.sign(token, key or self.key, **(fields | changes))
        return Invoke(token.encode(), invocation.encode(), arguments).padded()

    def answer(self, request: bytes) -> str:
        return Reply.parse(self.server.answer(request, BINDING, self._replay)).code

    def send(self, request: bytes) -> str:
        """The reply's code, once the service was told what it is told of it."""
        code = self.answer(request)
        self.server._refusals.tell()
        return code

    def said(self, code: str) -> list[dict[str, Any]]:
        return [one for one in self.realm.entries(KIND) if one["code"] == code]


@pytest.fixture
def door(realm: Any) -> Door:
    return Door(realm)


@pytest.mark.threat("ENC-42")
def test_a_stolen_token_a_replay_and_what_a_handle_does_not_allow_are_in_the_log(door: Door) -> None:
    # Whoever has the token and not its key sends what he heard, for arguments of his own.
    heard = Invoke.parse(door.request())
    stolen = Invoke(heard.token, heard.invocation, {"number": 9}).padded()
    captured = door.request()
    narrow = door.token.attenuate(door.key, Scope(operations={}))
    attempts = {
        "holder_refused": stolen,
        "replayed": captured,
        "scope_exceeded": door.request(narrow),
        "unknown_operation": door.request(
            door.realm.grant(door.key, operations={"echo": bytes(32)}), operation_digest=bytes(32)
        ),
        "bad_argument": door.request(arguments={"number": 101}),
    }
    assert door.send(captured) == ""
    for code, request in attempts.items():
        assert door.send(request) == code
        (entry,) = door.said(code)
        assert (entry["asset"], entry["count"], entry["instance"]) == ("a/b", 1, door.enclave.result.instance)
        assert entry["handle"] == Token.parse(Invoke.parse(request).token).id
    # Nothing of it was charged, or reserved, and what the service refuses by itself stands there once.
    assert len(door.realm.entries("use")) == len(door.realm.entries("settled")) == 1
    spent = door.realm.grant(door.key, operations={"echo": echo.digest}, uses=0)
    assert door.send(door.request(spent)) == "budget_exhausted"
    assert len(door.realm.entries("use refused")) == 1 and not door.said("budget_exhausted")


@pytest.mark.threat("ENC-42", "SVC-6")
def test_they_grow_the_log_and_what_the_service_is_asked_with_their_logarithm_only(door: Door) -> None:
    for _ in range(20):
        # Narrowed handles are free: they do not make a refusal new.
        narrow = door.token.attenuate(door.key, Scope(uses=3))
        assert door.send(door.request(narrow, arguments={"number": 101})) == "bad_argument"
    assert [one["count"] for one in door.said("bad_argument")] == [1, 2, 4, 8, 16]
    assert [route for route, _ in door.realm.carried].count("refused") == 5
    other = door.realm.grant(door.key, operations={"echo": echo.digest})
    door.send(door.request(other, arguments={"number": 101}))
    assert [one["count"] for one in door.said("bad_argument")] == [1, 2, 4, 8, 16, 1]


@pytest.mark.threat("ENC-42")
def test_what_names_no_grant_of_the_owner_is_the_enclaves_own(door: Door) -> None:
    stranger = door.realm.owner
    door.realm.owner = SigningKey.generate()
    forged = door.realm.grant(door.key, operations={"echo": echo.digest})
    door.realm.owner = stranger
    elsewhere = door.realm.grant(door.key, "c/d", operations={"echo": echo.digest})
    ended = door.realm.grant(door.key, operations={"echo": echo.digest}, expires=door.realm.clock())
    for code, request in {
        "malformed": b"no request", "capability_refused": door.request(forged),
        "scope_exceeded": door.request(elsewhere), "expired": door.request(ended),
    }.items():  # fmt: skip
        assert door.send(request) == code
        (entry,) = door.said(code)
        assert entry == {
            "kind": KIND, "code": code, "count": 1, "instance": door.enclave.result.instance
        }  # fmt: skip
    # Nor does the service get, to look at, what anyone may have made up.
    sent = [
        RefusalReport.parse(Signed.parse(body).body) for route, body in door.realm.carried if route == "refused"
    ]
    assert [one.code for one in sent if one.token] == ["scope_exceeded"]


@pytest.mark.threat("ENC-42")
def test_a_service_that_is_away_hears_of_it_later_and_the_refusal_stands(door: Door) -> None:
    def away(*_: Any) -> Any:
        raise ServiceUnavailable("away")

    bad = {"arguments": {"number": 101}}
    door.realm.courier = away
    assert [door.send(door.request(**bad)) for _ in range(3)] == ["bad_argument"] * 3
    assert door.send(b"no request") == "malformed"
    door.realm.courier = door.realm.serve
    assert not door.realm.entries(KIND)
    assert door.server._refusals.tell() and door.server._refusals.tell()
    assert [one["count"] for one in door.said("bad_argument")] == [3]
    assert [one["count"] for one in door.said("malformed")] == [1]
    assert door.send(door.request(**bad)) == "bad_argument"
    assert [one["count"] for one in door.said("bad_argument")] == [3, 4]


@pytest.mark.threat("ENC-43")
def test_no_refusal_waits_for_the_service_or_is_another_by_its_fault(door: Door) -> None:
    """Nor does the time that it takes tell how many were refused before."""
    carried = len(door.realm.carried)
    door.realm.courier = lambda *_: pytest.fail("a client waited for this")
    for _ in range(5):
        assert door.answer(door.request(arguments={"number": 101})) == "bad_argument"
        assert door.answer(b"no request") == "malformed"
    assert len(door.realm.carried) == carried


@pytest.mark.threat("ENC-42")
def test_what_serves_tells_by_itself_and_goes_on_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolate.enclave.refusals.AGAIN", 0.001)
    told: list[tuple[str, int]] = []
    faults, done = [ValueError("a bug"), ServiceUnavailable("away")], threading.Event()

    class Workload:
        @staticmethod
        def report_refusals(report: RefusalReport) -> None:
            if faults:
                raise faults.pop()
            told.append((report.code, report.times))
            if report.code == "y":
                done.set()

    refusals, asked = Refusals(Workload()), list[bool]()  # type: ignore[arg-type]
    tell = refusals.tell
    monkeypatch.setattr(refusals, "tell", lambda: asked.append(True) or tell())
    threading.Thread(target=refusals.run, daemon=True).start()
    refusals.note(b"", b"", "x")
    refusals.note(b"", b"", "y")
    assert done.wait(10) and sorted(told) == [("x", 1), ("y", 1)]
    # And waits for the next one without asking itself over and over.
    time.sleep(0.02)
    assert len(asked) < 10


@pytest.mark.threat("SVC-6")
def test_what_an_enclave_refuses_hides_nothing_that_the_service_refuses(door: Door) -> None:
    """Of one grant and one code; to be refused by the enclave costs nothing."""
    captured = door.request()
    assert door.send(captured) == ""
    assert {door.send(captured) for _ in range(5)} == {"replayed"}
    sent = Invoke.parse(captured)
    hashed = hash_arguments(cbor.encode(sent.arguments))
    again = ReserveRequest(sent.token, sent.invocation, BINDING, hashed, 256)
    assert door.realm.code(lambda: door.enclave.reserve(again, b"")) == "replayed"
    assert [one["count"] for one in door.said("replayed")] == [1, 2, 4]
    assert [(one["code"], one["count"]) for one in door.realm.entries("use refused")] == [("replayed", 1)]


def test_a_grant_with_a_limit_that_is_not_enforced_is_named(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("enclave.runtime", "service.budgets"):
        monkeypatch.setattr(f"isolate.{module}.ENFORCED", frozenset())
    assert door.send(door.request()) == "not_enforced"
    (entry,) = door.said("not_enforced")
    assert (entry["asset"], entry["handle"]) == ("a/b", door.token.id)


def test_of_several_at_once_there_is_one_entry_where_one_of_them_is_due(realm: Any) -> None:
    realm.asset()
    enclave, counts = realm.enclave(), []
    for times in (3, 1, 3, 1, 100):
        report = realm.signed_by(enclave, RefusalReport(b"", "x", times))
        counts.append(realm.ask("refused", report, Noted).count)
    assert counts == [3, 4, 7, 8, 108]
    assert [one["count"] for one in realm.entries(KIND)] == [3, 4, 8, 108]
    for code, times in (("No code", 1), ("x" * 65, 1), ("x", 0), ("x", 2**32 + 1)):
        with pytest.raises(MalformedError):
            RefusalReport(b"", code, times)


def test_threads_lose_none() -> None:
    told: list[tuple[str, int]] = []

    class Workload:
        @staticmethod
        def report_refusals(report: RefusalReport) -> None:
            if not told:
                refusals.note(b"g", b"t", "y")  # the 2nd, while the 1st waits for its turn
            told.append((report.code, report.times))

    refusals: Any = Refusals(Workload())  # type: ignore[arg-type]
    refusals.note(b"g", b"t", "x")
    refusals.note(b"g", b"t", "y")
    assert refusals.tell() and refusals.tell() and told == [("x", 1), ("y", 2)]
    threads = [
        threading.Thread(target=lambda: [refusals.note(b"g", b"t", "z") for _ in range(256)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert refusals.tell()
    assert refusals.tell() and sum(times for code, times in told if code == "z") == 2048
