"""Serving handles: the seven numbered checks of enclave/runtime.py, and what leaves when one of them refuses."""

from __future__ import annotations

import hmac
import itertools
import json
import os
import socket
import threading
import time
from typing import Any, ClassVar

import numpy as np
import pytest
from attrs import evolve

from isolate.capability.invocation import Invocation, ReplayGuard, hash_arguments
from isolate.capability.scope import Range, Scope
from isolate.capability.token import Token, grant
from isolate.crypto import cbor
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey
from isolate.enclave.operations import Aggregates, Array, Count, Integer, Label, Rows, Text, Vector, operation
from isolate.enclave.runtime import MAX_CLIENTS, Server, peer_pid
from isolate.errors import (
    CapabilityRefused,
    ChannelClosed,
    ChannelTruncated,
    HandshakeRefused,
    ServiceUnavailable,
    UsageError,
)
from isolate.messages.base import MAX_MESSAGE, Answer, Refusal, Signed
from isolate.messages.invoke import Invoke, Receipt, Reply, Reservation, SettleRequest
from isolate.messages.owner import ExplainRequest, Explanation, Revoke

BINDING = b"b" * 32
CANARY = "canary-1234567890"


@operation(inputs={"number": Integer(0, 100)}, output=Label(101))
def echo(view: Any, number: int) -> int:
    return number


@operation(inputs={}, output=Label(10))
def careless(view: Any) -> Any:
    return view["w"]


@operation(inputs={}, output=Label(10))
def failing(view: Any) -> Any:
    raise ValueError(CANARY, view["w"])


@operation(inputs={"image": Array("uint8", (4,))}, output=Label(10))
def tamper(view: Any, image: Any) -> Any:
    view["w"][0] = 7


class Long:
    """An output type of somebody else's, that lets long answers out."""

    kind: ClassVar[str] = "text"

    def schema(self) -> list[Any]:
        return ["long"]

    def sizes(self) -> tuple[int, ...]:
        return (1,)

    def check(self, value: Any) -> Any:
        return value

    def longest(self) -> Any:
        return "x"


@operation(inputs={}, output=Long())
def long(view: Any) -> Any:
    return "x" * 500


@operation(inputs={}, output=Long())
def odd(view: Any) -> Any:
    return object()


@operation(inputs={"words": Integer(0, 200)}, output=Text(200))
def speak(view: Any, words: int) -> str:
    return "word" * words


@operation(inputs={"shift": Integer(0, 9)}, output=Aggregates(("a", "b"), {"people": Count()}, 2))
def count(view: Any, shift: int) -> Any:
    entity = view["w"].astype(int)
    return Rows(entity, (entity >= 1 + shift).astype(int))


@operation(inputs={}, output=Vector(8, 0, 255, 255), seeded=True)
def dice(view: Any, seed: bytes) -> Any:
    return list(seed[:8])


@operation(inputs={"top": Integer(0, 9)}, output=Label(10), price=lambda top: 1000 * top)
def priced(view: Any, top: int) -> int:
    return top


OPERATIONS = [echo, careless, failing, tamper, long, odd, speak, count, dice, priced]


class Client:
    """The holder of a token, over a channel with a binding of its own."""

    def __init__(self, realm: Any, asset: str = "a/b", **limits: Any) -> None:
        self.key, self.counter = SigningKey.generate(), itertools.count(1)
        scope = Scope(**({"operations": {one.name: one.digest for one in OPERATIONS}} | limits))
        self.token = grant(realm.owner, asset=asset, scope=scope, holder=self.key.verifying_key.ed25519)
        self.replay = ReplayGuard(BINDING)

    def request(self, operation: Any, arguments: dict[str, Any], **changes: Any) -> bytes:
        fields: dict[str, Any] = {
            "operation": operation.name, "operation_digest": operation.digest,
            "argument_hash": hash_arguments(cbor.encode(arguments)), "channel_binding": BINDING,
            "nonce": Secret.generate(16).expose().tobytes(), "counter": next(self.counter),
        }  # fmt: skip
        token: Token = changes.pop("token", self.token)
        invocation = Invocation.sign(token, self.key, **(fields | changes))
        return Invoke(token.encode(), invocation.encode(), arguments).padded()

    def ask(self, server: Server, operation: Any, arguments: dict[str, Any] | None = None, **changes: Any) -> Reply:
        raw = server.answer(self.request(operation, arguments or {}, **changes), BINDING, self.replay)
        assert len(raw) == operation.reply_size
        assert CANARY.encode() not in raw
        reply = Reply.parse(raw)
        assert 14 <= len(reply.request_id) <= 16
        return reply


@pytest.fixture
def server(realm: Any) -> Server:
    realm.asset()
    return Server(realm.enclave(), "a/b", {"w": np.arange(4, dtype=np.float32)}, OPERATIONS)


def test_a_result(realm: Any, server: Server) -> None:
    reply = Client(realm).ask(server, echo, {"number": 42})
    assert (reply.code, reply.value) == ("", 42)
    assert len(realm.entries("use")) == 1


@pytest.mark.threat("ENC-12")
def test_check_1_a_token_of_another_owner_or_for_another_asset(realm: Any, server: Server) -> None:
    assert Client(realm, asset="c/d").ask(server, echo, {"number": 1}).code == "scope_exceeded"
    mine, realm.owner = realm.owner, SigningKey.generate()
    stranger = Client(realm)
    realm.owner = mine
    assert stranger.ask(server, echo, {"number": 1}).code == "capability_refused"
    client = Client(realm, expires=realm.clock())
    assert client.ask(server, echo, {"number": 1}).code == "expired"
    other = realm.grant(client.key, operations={"echo": echo.digest}, epoch=2)
    assert client.ask(server, echo, {"number": 1}, token=other).code == "epoch_ended"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isolate.enclave.runtime.ENFORCED", frozenset({"operations", "depth"}))
        assert Client(realm, uses=2).ask(server, echo, {"number": 1}).code == "not_enforced"
    # The service would refuse all of these as well; here they do not even reach it.
    assert not [one for one in realm.carried if one[0] == "reserve"]


@pytest.mark.threat("ENC-12")
def test_check_2_an_invocation_for_another_channel_or_other_arguments(realm: Any, server: Server) -> None:
    client = Client(realm)
    assert client.ask(server, echo, {"number": 1}, channel_binding=b"x" * 32).code == "holder_refused"
    other = hash_arguments(cbor.encode({"number": 2}))
    assert client.ask(server, echo, {"number": 1}, argument_hash=other).code == "holder_refused"
    narrowed = client.token.attenuate(client.key, Scope(operations={}))
    assert client.ask(server, echo, {"number": 1}, token=narrowed).code == "scope_exceeded"
    assert not [one for one in realm.carried if one[0] == "reserve"]


@pytest.mark.threat("ENC-12", "CAP-11")
def test_check_2_a_captured_request_in_another_session_or_to_another_enclave(realm: Any, server: Server) -> None:
    """Under a lease too, where the service is not asked, which refuses an invocation that it knows."""
    client, other = Client(realm, lease=50), Server(realm.enclave(rank=1), "a/b", server._view, OPERATIONS)
    for place in (server, other):
        assert client.ask(place, echo, {"number": 1}).value == 1
    captured, asked = client.request(echo, {"number": 2}), len(realm.carried)
    assert Reply.parse(server.answer(captured, BINDING, client.replay)).value == 2
    for place in (server, other):
        session = b"another session".ljust(32)
        reply = Reply.parse(place.answer(captured, session, ReplayGuard(session)))
        assert (reply.code, reply.value) == ("holder_refused", None)
    assert len(realm.carried) == asked


@pytest.mark.threat("ENC-12", "CAP-12", "CAP-7")
def test_check_2_a_deputy_with_a_wider_token_and_a_thief_without_its_key(realm: Any, server: Server) -> None:
    wide = Client(realm)
    narrow = wide.token.attenuate(wide.key, Scope(operations={"echo": echo.digest}))
    used = Invoke.parse(wide.request(speak, {"words": 1}, token=narrow))
    assert Reply.parse(server.answer(used.padded(), BINDING, wide.replay)).code == "scope_exceeded"
    deputy = Invoke(wide.token.encode(), used.invocation, used.arguments)
    assert Reply.parse(server.answer(deputy.padded(), BINDING, wide.replay)).code == "holder_refused"
    thief = Client(realm)
    stolen = Invoke.parse(thief.request(echo, {"number": 1}))
    claimed = bytearray(stolen.invocation)
    claimed[64 + 9 : 64 + 41] = wide.token.id  # signed for the thief's own handle, and sent as if for this one
    for invocation in (stolen.invocation, bytes(claimed)):
        copied = Invoke(wide.token.encode(), invocation, stolen.arguments)
        assert Reply.parse(server.answer(copied.padded(), BINDING, thief.replay)).code == "holder_refused"
    assert not [one for one in realm.carried if one[0] == "reserve"]


@pytest.mark.threat("ENC-12")
def test_check_3_a_request_sent_again_over_the_same_channel(realm: Any, server: Server) -> None:
    client = Client(realm)
    raw = client.request(echo, {"number": 1})
    codes = [Reply.parse(server.answer(raw, BINDING, client.replay)).code for _ in range(2)]
    assert codes == ["", "replayed"]
    assert len([one for one in realm.carried if one[0] == "reserve"]) == 1


@pytest.mark.threat("ENC-12")
def test_check_4_an_operation_that_does_not_run_here_or_is_of_another_version(realm: Any, server: Server) -> None:
    few = Server(server._workload, "a/b", {}, [careless])
    assert Client(realm).ask(few, echo, {"number": 1}).code == "unknown_operation"

    @operation(inputs={"number": Integer(0, 100)}, output=Label(101), version=2)
    def echo_two(view: Any, number: int) -> int:
        return number

    newer = type(echo)("echo", 2, echo_two.inputs, echo_two.output, echo_two.digest, echo_two.function)
    assert Client(realm).ask(Server(server._workload, "a/b", {}, [newer]), echo, {"number": 1}).code == (
        "unknown_operation"
    )
    limited = Client(realm, parameters={"echo": {"number": Range(0, 5)}})
    assert limited.ask(server, echo, {"number": 6}).code == "scope_exceeded"
    assert not [one for one in realm.carried if one[0] == "reserve"]
    assert limited.ask(server, echo, {"number": 5}).value == 5


@pytest.mark.threat("ENC-13")
def test_check_5_nothing_runs_that_was_not_charged(realm: Any, server: Server) -> None:
    ran: list[int] = []

    @operation(inputs={}, output=Label(2))
    def note(view: Any) -> int:
        ran.append(1)
        return 1

    counting = Server(server._workload, "a/b", {}, [note])
    client = Client(realm, operations={"note": note.digest}, uses=1)
    assert client.ask(counting, note).value == 1
    assert client.ask(counting, note).code == "budget_exhausted"

    def down(*_: Any) -> Any:
        raise ServiceUnavailable("no")

    def forged(_: str, body: bytes) -> tuple[int, bytes]:
        reservation = Reservation.make(b"i" * 32, 1, 1, SigningKey.generate())
        return 200, Answer.make(Signed.parse(body), reservation, SigningKey.generate()).encode()

    def for_another(_: str, body: bytes) -> tuple[int, bytes]:
        key = realm.state.release_key
        return 200, Answer.make(Signed.parse(body), Reservation.make(b"i" * 32, 1, 1, key), key).encode()

    free = Client(realm, operations={"note": note.digest})
    codes = []
    for realm.courier in (down, forged, for_another):
        codes.append(free.ask(counting, note).code)
    assert codes == ["service_unavailable", "forged_answer", "receipt_refused"]
    assert ran == [1]


@pytest.mark.threat("ENC-13")
def test_check_5_a_failed_operation_is_charged(realm: Any, server: Server) -> None:
    client = Client(realm, uses=2)
    assert client.ask(server, failing).code == "operation_failed"
    assert client.ask(server, careless).code == "output_refused"
    assert client.ask(server, echo, {"number": 1}).code == "budget_exhausted"
    assert [one["code"] for one in realm.entries("settled")] == ["operation_failed", "output_refused"]


@pytest.mark.threat("ENC-13")
def test_check_5_a_price_above_the_reply_is_what_is_reserved_and_settled(realm: Any, server: Server) -> None:
    client = Client(realm, bytes_out=5256)
    codes = [client.ask(server, priced, {"top": top}).code for top in (3, 2, 1, 0, 0)]
    assert codes == ["", "", "budget_exhausted", "", "budget_exhausted"]
    for kind in ("use", "settled"):
        assert [one["bytes_out"] for one in realm.entries(kind)] == [3000, 2000, 256]


@pytest.mark.threat("ENC-9", "ENC-3")
def test_check_6_the_weights_themselves_and_what_is_longer_than_was_charged(realm: Any, server: Server) -> None:
    client = Client(realm)
    assert client.ask(server, careless).code == "output_refused"
    assert client.ask(server, long).code == "output_refused"
    assert client.ask(server, odd).code in ("usage", "operation_failed")


@pytest.mark.threat("ENC-30")
@pytest.mark.parametrize("when", ["revoked", "expired"])
def test_check_7_what_ends_while_the_operation_runs_gets_nothing(realm: Any, server: Server, when: str) -> None:
    client: Any = None

    @operation(inputs={}, output=Label(10))
    def slow(view: Any) -> int:
        if when == "revoked":
            realm.tell("revoke", Revoke(client.token.id))
        else:
            realm.clock.now += 100
        return 7

    client = Client(realm, operations={"slow": slow.digest}, expires=realm.clock() + 50)
    reply = client.ask(Server(server._workload, "a/b", {}, [slow]), slow)
    assert (reply.code, reply.value) == (when, None)
    assert [len(realm.entries(kind)) for kind in ("use", "settled")] == [1, 0]


@pytest.mark.threat("ENC-31")
def test_check_7_nothing_leaves_without_the_services_receipt_for_it(realm: Any, server: Server) -> None:
    """Answers to settle that are missing, somebody else's, for another use, another size or another code."""
    client, key = Client(realm), realm.state.release_key

    def answering(make: Any) -> Any:
        def courier(route: str, body: bytes) -> tuple[int, bytes]:
            if route != "settle":
                return realm.serve(route, body)  # type: ignore[no-any-return]
            signed = Signed.parse(body)
            asked = SettleRequest.parse(signed.body)
            return 200, Answer.make(signed, make(asked), key).encode()

        return courier

    def receipt(asked: SettleRequest, signer: Any = key, **changes: Any) -> Receipt:
        fields = {"invocation": asked.invocation, "bytes_out": asked.bytes_out, "code": asked.code} | changes
        return Receipt(**fields, log_index=1, leaf=bytes(32), time=1).sign(signer)

    def missing(_: SettleRequest) -> Any:
        raise ServiceUnavailable("no")

    realm.courier = answering(receipt)
    assert client.ask(server, echo, {"number": 42}).value == 42
    for wrong, code in (
        (missing, "service_unavailable"),
        (lambda asked: receipt(asked, SigningKey.generate()), "receipt_refused"),
        (lambda asked: receipt(asked, invocation=bytes(32)), "receipt_refused"),
        (lambda asked: receipt(asked, bytes_out=0), "receipt_refused"),
        (lambda asked: receipt(asked, code="operation_failed"), "receipt_refused"),
        (lambda asked: evolve(receipt(asked), code="x"), "receipt_refused"),
        (lambda asked: Reservation.make(asked.invocation, 1, 1, key), "malformed"),
    ):
        realm.courier = answering(wrong)
        reply = client.ask(server, echo, {"number": 42})
        assert (reply.code, reply.value) == (code, None)
    # A failure needs its receipt too: else its reply would say more than what was settled.
    realm.courier = answering(lambda asked: receipt(asked, code=""))
    assert client.ask(server, failing).code == "receipt_refused"


@pytest.mark.threat("ENC-10")
def test_an_operation_exception_leaks_nothing(
    realm: Any, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = Client(realm).ask(server, failing)
    assert (reply.code, reply.value) == ("operation_failed", None)
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err
    assert reply.request_id in said.out


def test_operations_do_not_change_the_asset(realm: Any, server: Server) -> None:
    assert Client(realm).ask(server, tamper, {"image": bytes(4)}).code == "operation_failed"
    assert server._view["w"].tolist() == [0, 1, 2, 3]
    with pytest.raises(TypeError):
        server._view["x"] = 1  # type: ignore[index]


def test_a_server_whose_operations_have_one_name(server: Server) -> None:
    """Else the digest of one of them would name the other, or nothing."""
    with pytest.raises(UsageError, match="one name"):
        Server(server._workload, "a/b", {}, [echo, careless, echo])


def test_a_peer_over_the_network_has_no_process_here() -> None:
    with socket.socket() as listening, socket.socket() as peer:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        peer.connect(listening.getsockname())
        assert peer_pid(peer) == 0  # type: ignore[arg-type]
    one, two = socket.socketpair()
    with one, two:
        assert peer_pid(one) == os.getpid()  # type: ignore[arg-type]


def test_the_operator_is_told_of_a_refusal_by_code_and_number(
    realm: Any, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for asked, code in ((echo, "bad_argument"), (failing, "operation_failed")):
        reply = Client(realm).ask(server, asked)
        assert reply.code == code
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        assert said == [{"event": "invocation_refused", "code": code, "request_id": reply.request_id}]


@pytest.mark.threat("ENC-14")
def test_any_bytes_get_a_padded_refusal(realm: Any, server: Server) -> None:
    import random

    dice, client = random.Random(3), Client(realm)
    good = client.request(echo, {"number": 1})
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(dice.randint(1, 3)):
            raw[dice.randrange(len(raw) - 600)] ^= 1 << dice.randrange(8)
        reply = server.answer(raw, BINDING, client.replay)
        assert len(reply) == 256
        assert Reply.parse(reply).code
    for raw in (b"", b"\xff", bytes(MAX_MESSAGE + 1)):
        assert Reply.parse(server.answer(raw, BINDING, client.replay)).code == "malformed"


@pytest.mark.threat("ENC-3")
def test_results_and_refusals_of_an_operation_have_one_length(realm: Any, server: Server) -> None:
    """``ask`` checks the length of each: results short and long, refusals before and after the charge."""
    assert speak.reply_size == 1024
    client = Client(realm, uses=3)
    for words in (0, 1, 200):
        assert len(client.ask(server, speak, {"words": words}).value) == 4 * words
    assert client.ask(server, speak, {"words": 1}).code == "budget_exhausted"
    assert client.ask(server, speak, {"words": 201}).code == "bad_argument"
    assert client.ask(server, speak, {"words": 1}, channel_binding=b"x" * 32).code == "holder_refused"
    other = type(echo)("speak", 1, speak.inputs, speak.output, bytes(32), speak.function)
    assert client.ask(server, other, {"words": 1}).code == "scope_exceeded"


@pytest.mark.threat("ENC-32")
def test_check_4_outputs_that_the_scope_does_not_allow(realm: Any, server: Server) -> None:
    """By what the type could let out at most, and before anything runs: the refusal says nothing of the data."""
    client = Client(realm, outputs={"text": (200,), "label": (10,)})
    assert client.ask(server, speak, {"words": 1}).code == ""
    assert client.ask(server, echo, {"number": 1}).code == "scope_exceeded"  # 101 choices
    assert client.ask(server, dice).code == "scope_exceeded"
    assert Client(realm, outputs={"text": (199,)}).ask(server, speak, {"words": 1}).code == "scope_exceeded"
    assert len(realm.entries("use")) == 1


@pytest.mark.threat("ENC-33", "AGG-4")
def test_check_4_a_minimum_group_of_the_token_or_of_the_owner(realm: Any, server: Server) -> None:
    wide, narrow = Client(realm), Client(realm, minimum_group=3)
    assert wide.ask(server, count, {"shift": 1}).value == [[2], [2]]
    assert wide.ask(server, count, {"shift": 0}).value == [None, [3]]
    assert narrow.ask(server, count, {"shift": 1}).value == [None, None]
    assert narrow.ask(server, count, {"shift": 0}).value == [None, [3]]
    assert Client(realm, minimum_group=1).ask(server, count, {"shift": 0}).value == [None, [3]]
    assert narrow.ask(server, speak, {"words": 1}).code == "not_enforced"
    owners = Server(server._workload, "a/b", server._view, [count], minimum_group=3)
    assert wide.ask(owners, count, {"shift": 1}).value == [None, None]
    assert Client(realm, minimum_group=4).ask(owners, count, {"shift": 0}).value == [None, None]
    with pytest.raises(CapabilityRefused):
        Server(server._workload, "a/b", server._view, [count, speak], minimum_group=3)


@pytest.mark.threat("ENC-35")
def test_a_client_chooses_and_repeats_no_seed(realm: Any, server: Server) -> None:
    client = Client(realm)
    seeds = [tuple(client.ask(server, dice).value) for _ in range(3)]
    assert len(set(seeds)) == 3
    # The very same request, to another enclave of the same code: another secret.
    raw = client.request(dice, {})
    twin = Server(server._workload, "a/b", server._view, OPERATIONS)
    twin._workload = server._workload
    admitted = [one._admit(*_parsed(raw), BINDING, ReplayGuard(BINDING)) for one in (server, server, twin)]
    found = [one._perform(use) for one, use in zip((server, server, twin), admitted, strict=True)]
    assert found[0] == found[1] != found[2]
    # HKDF as docs/spec/operations.md, 3 has it: over the whole invocation, and for this operation.
    extracted = hmac.digest(bytes(32), bytes(server._seeds.expose()), "sha256")
    info = cbor.encode(["isolate/v1/operation/seed", admitted[0].invocation.id, dice.digest])
    assert found[0] == list(hmac.digest(extracted, info + b"\x01", "sha256")[:8])
    assert client.ask(server, dice, {"seed": b"x" * 32}).code == "bad_argument"


def _parsed(raw: bytes) -> tuple[Invoke, Invocation]:
    request = Invoke.parse(raw)
    return request, Invocation.parse(request.invocation)


class FakeListener:
    """Hands out channels, or raises, in order; then it is closed."""

    def __init__(self, *ends: Any) -> None:
        self.ends, self.lock = list(ends), threading.Lock()

    def accept(self) -> Any:
        with self.lock:
            end = self.ends.pop(0) if self.ends else ChannelClosed("over")
        if isinstance(end, BaseException):
            raise end
        return end

    def __enter__(self) -> FakeListener:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FakeChannel:
    binding = BINDING

    def __init__(self, *messages: bytes, silent: threading.Event | None = None) -> None:
        self.messages, self.sent, self.closed, self.silent = list(messages), list[bytes](), False, silent

    def fileno(self) -> int:
        return 0

    def recv_into(self, buffer: bytearray) -> int:
        if self.silent is not None:
            self.silent.wait(30)
        if not self.messages:
            raise ChannelTruncated("gone")
        message = self.messages.pop(0)
        buffer[: len(message)] = message
        return len(message)

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def __enter__(self) -> FakeChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@pytest.mark.threat("ENC-14")
def test_silent_and_refused_clients_keep_nobody_else_out(
    realm: Any, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client(realm)
    good = FakeChannel(client.request(echo, {"number": 7}))
    patience = threading.Event()
    silent = [FakeChannel(silent=patience) for _ in range(MAX_CLIENTS // 2)]
    refused = [HandshakeRefused("no"), ServiceUnavailable("no renewal now")] * 3
    monkeypatch.setattr("isolate.enclave.runtime.peer_pid", lambda _: 1)
    listener = FakeListener(*refused, *silent, good)
    monkeypatch.setattr(server._workload, "listen", lambda *_, **__: listener)
    silenced, telling = list[bool](), threading.Event()
    monkeypatch.setattr(server._refusals, "run", telling.set)
    monkeypatch.setattr("isolate.enclave.boot.only_events", lambda: silenced.append(True))
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + 20
    while not good.closed and time.monotonic() < end:
        time.sleep(0.02)
    assert good.closed
    assert not any(one.closed for one in silent)
    assert [Reply.parse(one).value for one in good.sent] == [7]
    patience.set()
    thread.join(20)
    assert all(one.closed for one in silent)
    assert silenced == [True] and telling.wait(20)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    events = [(one.pop("event"), one) for one in said]
    assert ("serving", {"asset": "a/b", "operations": sorted(one.name for one in OPERATIONS)}) in events
    assert events.count(("channel_accepted", {"peer_pid": 1})) == len(silent) + 1
    assert [one["code"] for name, one in events if name == "client_refused"].count("handshake_refused") == 3


def test_a_refusal_by_the_service_can_be_explained_by_its_number(realm: Any, server: Server) -> None:
    client = Client(realm, uses=0)
    reply = client.ask(server, echo, {"number": 1})
    assert reply.code == "budget_exhausted"
    found: Explanation = realm.tell("explain", ExplainRequest(reply.request_id), Explanation)
    assert (found.code, found.route) == ("budget_exhausted", "reserve")
    # What a courier writes there changes no length, and is no number.
    real = realm.serve

    def lie(route: str, body: bytes) -> tuple[int, bytes]:
        status, answer = real(route, body)
        if status == 200:
            return status, answer
        return status, Refusal("budget_exhausted", "", "", told.pop()).encode()

    realm.courier = lie
    told = ["f" * 64, "é" * 16, ""]
    while told:
        shown = client.ask(server, echo, {"number": 1}).request_id
        assert shown.isascii() and "f" * 14 not in shown
