"""The routes: who may ask what, what an answer is worth, and that no bytes make it fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from isolate import sealed
from isolate.crypto.signing import Purpose, SigningKey
from isolate.errors import RefusedError
from isolate.messages import http
from isolate.messages.attest import CertificateRequest, Registered, ReleaseRequest, ServiceCertificate
from isolate.messages.base import MAX_MESSAGE, Answer, Refusal, Signed
from isolate.messages.invoke import Receipt, Reservation, SettleRequest
from isolate.messages.owner import AssetRequest, AssetRule, Done, LogAnswer, LogRequest, Revoke
from isolate.service.app import Application
from isolate.service.routes import ROUTES
from isolate.transparency import Checkpoint, ConsistencyProof, InclusionProof


def refusal(answer: tuple[int, bytes]) -> tuple[int, str]:
    return answer[0], Refusal.parse(answer[1]).code


@pytest.mark.threat("SVC-26")
def test_an_owners_request_by_somebody_else_and_replayed(realm: Any) -> None:
    revoke = Revoke(bytes(32))
    thief = realm.owner_request(revoke, SigningKey.generate())
    good = realm.owner_request(revoke)
    # Under the owner's name, with the thief's signature; for another purpose; of an attested enclave.
    named = evolve(thief, key=realm.owner.verifying_key.to_bytes())
    wrong = Signed.make(Purpose.HOLDER_REQUEST, realm.owner, revoke.encode(), bytes(32), "svc/1")
    enclave = realm.signed_by(realm.enclave(), revoke, purpose=Purpose.OWNER_REQUEST)
    moved = Signed.make(Purpose.OWNER_REQUEST, realm.owner, revoke.encode(), bytes(32), "another")
    rows = realm.rows()
    for request, code in (
        (thief, "not_owner"), (named, "bad_signature"), (wrong, "bad_signature"), (enclave, "not_owner"),
        (moved, "wrong_audience"),
    ):  # fmt: skip
        assert refusal(realm.serve("owner/revoke", request.encode())) == (403, code)
    assert realm.rows() == rows
    realm.ask("owner/revoke", good, Done)
    assert refusal(realm.serve("owner/revoke", good.encode())) == (403, "replayed")
    realm.reopen()
    assert refusal(realm.serve("owner/revoke", good.encode())) == (403, "replayed")
    assert len(realm.entries("revoke")) == 1


@pytest.mark.threat("SVC-26")
def test_one_request_does_not_go_to_another_route(realm: Any) -> None:
    request = realm.owner_request(Revoke(bytes(32)))
    for route in ("owner/policy", "owner/rule", "owner/register", "owner/asset", "owner/evidence", "release"):
        assert realm.serve(route, request.encode())[0] in (400, 403)
    realm.ask("owner/revoke", request, Done)


@pytest.mark.threat("SVC-27")
def test_a_courier_makes_up_no_answer_and_swaps_none(realm: Any) -> None:
    """It drops a revocation and says that it is done; it shows an old file as the newest."""
    realm.asset()
    old = realm.serve("owner/asset", realm.owner_request(AssetRequest("a/b")).encode())
    realm.register(realm.seal(epoch=2))

    def lie(body: bytes) -> Callable[[str, bytes], tuple[int, bytes]]:
        return lambda *_: (200, body)

    def asked(request: Signed, kind: Any) -> str:
        return str(realm.code(lambda: realm.ask("any", request, kind)))

    question = realm.owner_request(AssetRequest("a/b"))
    realm.courier = lie(old[1])
    assert asked(question, Registered) == "forged_answer"
    forged = Answer.make(question, Registered("a/b", bytes(32), 9, 1), SigningKey.generate())
    realm.courier = lie(forged.encode())
    assert asked(question, Registered) == "forged_answer"
    genuine = Answer.parse(realm.serve("owner/asset", question.encode())[1])
    realm.courier = lie(evolve(genuine, body=Registered("a/b", bytes(32), 9, 1).encode()).encode())
    assert asked(question, Registered) == "forged_answer"
    realm.courier = lie(Done(3).encode())
    assert asked(realm.owner_request(Revoke(bytes(32))), Done) == "malformed"
    realm.courier = lie(genuine.encode())
    assert realm.ask("any", question, Registered).epoch == 2


def test_unknown_routes(realm: Any) -> None:
    for route in ("", "none", "owner", "owner/", "owner/none", "../release", "certificate/", "release\0"):
        assert refusal(realm.serve(route, b"")) == (404, "unknown_route")


def bodies(realm: Any) -> list[tuple[str, bytes]]:
    """One good request for each route, the way they were carried."""
    realm.courier = realm.serve
    realm.asset()
    enclave = realm.enclave("writer")
    realm.rule("a/b", readers=("writer",), writers=("writer",))
    holder = SigningKey.generate()
    token = realm.grant(holder)
    reserved = realm.ask("reserve", realm.signed_by(enclave, realm.use(token, holder)), Reservation)
    realm.ask("settle", realm.signed_by(enclave, SettleRequest(reserved.invocation, 256, "")), Receipt)
    return [
        *dict(realm.carried).items(),
        ("log", LogRequest(0, 0).encode()),
        ("certificate", CertificateRequest().encode()),
        ("release", realm.signed_by(enclave, ReleaseRequest(bytes(32), ["x"], bytes(32))).encode()),
        ("budget", realm.owner_request(AssetRequest("a")).encode()),
    ]


def mutate(body: bytes, dice: random.Random) -> bytes:
    changed = bytearray(body)
    # Until it is another: a byte may be changed to what it was.
    while changed == body:
        at = dice.randrange(len(changed) + 1)
        match dice.randrange(5):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << dice.randrange(8)
            case 1:
                del changed[at : at + dice.randint(1, 40)]
            case 2:
                changed[at:at] = dice.randbytes(dice.randint(1, 8))
            case 3:
                del changed[at:]
            case _:
                changed[at : at + 1] = dice.choice(
                    [b"\x1b" + b"\xff" * 8, b"\x3b" + b"\xff" * 8, b"\xf6", b"\x80", b"\xa0"]
                )
    return bytes(changed)


@pytest.mark.threat("SVC-28")
def test_2000_malformed_requests_are_refused_and_change_nothing(realm: Any) -> None:
    good = bodies(realm)
    dice, rows = random.Random(7), realm.rows()
    for number in range(2000):
        route, body = dice.choice(good)
        if number % 5 == 0:  # a good message on a wrong route
            route = dice.choice([*ROUTES, "none"])
        status, answer = realm.serve(route, mutate(body, dice))
        assert status in (200, 400, 403, 404), (number, route, status)
        if status != 200:
            assert Refusal.parse(answer).code != "internal"
        else:
            assert route in ("log", "challenge", "certificate")
    assert realm.rows() == rows


@pytest.mark.threat("SVC-28")
def test_a_body_that_is_signed_and_odd(realm: Any) -> None:
    """Malformed bodies under good signatures: whoever may sign can still not make it fail."""
    enclave, dice, rows = realm.enclave(), random.Random(8), realm.rows()
    holder = SigningKey.generate()
    use = realm.use(realm.grant(holder), holder)
    inner = [
        ReleaseRequest(bytes(32), [], bytes(32)), use, AssetRule("a", [], []), AssetRequest("a"), Revoke(bytes(32)),
    ]  # fmt: skip
    for number in range(300):
        raw = mutate(dice.choice(inner).encode(), dice)
        key, purpose = (
            (realm.owner, Purpose.OWNER_REQUEST) if number % 2 else (enclave._signing, Purpose.ENCLAVE_REQUEST)
        )
        signed = Signed.make(purpose, key, raw, dice.randbytes(32), "svc/1", "" if number % 2 else enclave.token())
        for route in (name for name, row in ROUTES.items() if row.who != "anyone"):
            status, answer = realm.serve(route, signed.encode())
            assert status in (200, 400, 403), (route, raw.hex())
            assert status == 200 or Refusal.parse(answer).code != "internal"
    changed = {name for name, count in realm.rows().items() if count != rows[name]}
    assert changed <= {"seen", "refused", "entry", "node", "rule", "revoked", "charged", "account"}


def test_what_is_unforeseen_is_told_to_nobody(realm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> Any:
        raise ValueError("canary")

    realm.service.log.answer = fail
    status, answer = realm.serve("log", LogRequest(0, None).encode())
    assert refusal((status, answer)) == (500, "internal")
    said = capsys.readouterr()
    assert b"canary" not in answer
    assert "canary" not in said.out + said.err
    assert "ValueError" in said.out + said.err


def test_a_refusal_has_the_class_of_its_error(realm: Any) -> None:
    from isolate.errors import AppraisalRefused, ReleaseRefused, RolledBack

    with pytest.raises(AppraisalRefused) as refused:
        realm.enclave("unknown")
    assert (refused.value.code, refused.value.request_id != "") == ("appraisal_measurement", True)
    with pytest.raises(ReleaseRefused):
        realm.enclave().unlock(sealed.public_facts(realm.seal()))
    realm.asset()
    with pytest.raises(RolledBack):
        realm.register(realm.seal(epoch=0))


def test_the_log_is_proved_to_anyone(realm: Any) -> None:
    key, origin = realm.state.certificate.log_key.ed25519, "isolate/svc/1"

    def ask(old: int, index: int | None) -> LogAnswer:
        answer: LogAnswer = realm.post("", "log", LogRequest(old, index), LogAnswer)
        return answer

    early = Checkpoint.verify(ask(0, None).checkpoint, origin, key)
    realm.asset()
    answer = ask(early.size, 1)
    late = Checkpoint.verify(answer.checkpoint, origin, key)
    assert (early.size, late.size) == (1, 3)
    InclusionProof(1, late.size, tuple(answer.inclusion)).verify(answer.entry or b"", late)
    ConsistencyProof(early.size, late.size, tuple(answer.consistency)).verify(early, late)
    for old, index in ((4, None), (2**64 - 1, None), (0, 3), (0, 2**64 - 1)):
        assert realm.code(lambda old=old, index=index: ask(old, index)) == "usage"
    # An entry shows a kind and a time; what it is about is a salted commitment.
    assert b"a/b" not in (answer.entry or b"")


# Over HTTP


def call(service: Any, path: str, parts: list[bytes], method: str = "POST") -> tuple[int, bytes]:
    """One request to the ASGI application, as a server makes it."""
    sent: list[dict[str, Any]] = []
    waiting = [
        {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}
        for number, part in enumerate(parts)
    ]

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop(0)
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": [],
        "server": ("isolate", 80), "client": None,
    }  # fmt: skip
    asyncio.run(Application(service)(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"], b"".join(one.get("body", b"") for one in sent[1:])


def test_http(realm: Any) -> None:
    service, body = realm.service, CertificateRequest().encode()
    status, answer = call(service, "/v1/certificate", [body[:5], body[5:]])
    assert (status, ServiceCertificate.parse(answer)) == (200, realm.state.certificate)
    assert refusal(call(service, "/v1/none", [b""])) == (404, "unknown_route")
    assert refusal(call(service, "/v1/owner/none", [b""])) == (404, "unknown_route")
    assert refusal(call(service, "/v1/log", [b"rubbish"])) == (400, "malformed")
    assert refusal(call(service, "/v1/log", [bytes(MAX_MESSAGE), b"1"])) == (413, "too_large")
    assert call(service, "/health", [b""], "GET") == (200, b"ok\n")
    assert call(service, "/", [b""])[0] == 404


def test_a_body_that_never_ends_is_given_up(realm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolate.service.app.BODY_TIMEOUT", 0.05)
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": b"a", "more_body": True}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await asyncio.sleep(60)
        return {}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/log",
        "headers": [],
        "query_string": b"",
        "root_path": "",
    }
    asyncio.run(Application(realm.service)(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


def test_a_forged_refusal_prints_no_escapes(realm: Any) -> None:
    realm.courier = lambda *_: (403, Refusal("rolled_back", "\x1b[2J\nfine", "", "", "").encode())
    with pytest.raises(RefusedError) as refused:
        realm.post("", "log", LogRequest(0, None), LogAnswer)
    assert str(refused.value) == "?[2J?fine"
    assert http.error_of(Refusal("No Code", "", "", "", "released")).code == "refused"
