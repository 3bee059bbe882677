"""The owner reads the log with its details, and sees where the service tells something else than everybody sees."""

from __future__ import annotations

import json
from typing import Any

import pytest

from isolate.cli import main
from isolate.client import entries, owner
from isolate.client.owner import Owner
from isolate.crypto import cbor
from isolate.crypto.signing import SigningKey
from isolate.errors import LogRefused, MalformedError
from isolate.messages.base import MAX_MESSAGE
from isolate.messages.owner import Entries, EntriesRequest, Revoke
from isolate.service.tiles import Tiles
from isolate.transparency.checkpoint import sign_checkpoint

Told = list[dict[str, bytes]]


@pytest.fixture
def mine(realm: Any, till: Any, holder: SigningKey, monkeypatch: pytest.MonkeyPatch) -> Owner:
    """The owner, over a service at which something was used, refused and revoked."""
    token = realm.grant(holder, uses=1)
    till.send(realm.use(token, holder))
    assert till.use(token, holder) == "budget_exhausted"
    realm.tell("revoke", Revoke(token.id))
    tiles = Tiles(realm.state, realm.service.log)
    monkeypatch.setattr(owner, "fetch", lambda _, path, most: tiles.answer(path.removeprefix("/log/")).body)
    return Owner(realm.owner, service="unix:/service", lineage="acme")


def told(realm: Any, start: int = 0, most: int = 256) -> Told:
    answer: Entries = realm.tell("entries", EntriesRequest(start, most), Entries)
    return answer.entries


def test_an_owner_reads_what_was_used_refused_and_revoked(realm: Any, mine: Owner) -> None:
    found = list(mine.entries())
    assert [{"kind": one.kind, **one.details} for one in found] == realm.entries()
    assert [one.index for one in found] == list(range(len(found)))
    assert [one.time for one in found] == [one["time"] for one in realm.public()]
    refused = next(one for one in found if one.kind == "use refused")
    assert (refused.details["code"], refused.details["asset"]) == ("budget_exhausted", "a/b")
    assert [one.index for one in mine.entries(4)] == list(range(4, len(found)))
    assert list(mine.entries(len(found))) == list(mine.entries(2**64 - 1)) == []
    with pytest.raises(MalformedError):
        next(mine.entries(-1))


def test_a_long_log_comes_in_several_answers(realm: Any, mine: Owner) -> None:
    with realm.state.transaction() as database:
        for number in range(300):
            realm.service.log.append(database, "other", {"number": number})
        realm.service.log.append(database, "large", {"text": "x" * (MAX_MESSAGE // 2 - 1000)})
        for _ in range(3):
            realm.service.log.append(database, "large", {"text": "x" * 60_000})
    before = len(realm.carried)
    found = list(mine.entries())
    assert [one.details.get("number") for one in found if one.kind == "other"] == list(range(300))
    assert len(found) == len(realm.entries())
    sizes = [len(body) for route, body in realm.carried[before:] if route == "owner/entries"]
    assert len(sizes) == 4
    assert realm.code(lambda: EntriesRequest(0, 257)) == realm.code(lambda: EntriesRequest(0, 0)) == "malformed"


@pytest.mark.threat("LOG-24")
def test_what_opens_the_log_is_the_owners_alone(realm: Any, mine: Owner, holder: SigningKey) -> None:
    stranger = Owner(realm.owner, service="unix:/service", lineage="acme")
    stranger.certificate  # noqa: B018 (asked for before the key is another)
    stranger._key = holder
    assert realm.code(lambda: next(stranger.entries())) == "not_owner"
    assert realm.code(lambda: realm.ask(
        "owner/entries", realm.signed_by(realm.enclave(), EntriesRequest(0, 1)), Entries
    )) == "bad_signature"  # fmt: skip


@pytest.mark.threat("LOG-24")
def test_a_service_that_tells_its_owner_something_else_is_seen(realm: Any, mine: Owner) -> None:
    honest, size = told(realm), len(realm.entries())
    place = next(number for number, one in enumerate(realm.entries()) if one["kind"] == "use")
    used = honest[place]
    details = cbor.encode({**cbor.decode(used["details"]), "asset": "c/d"})
    salted = {**used, "details": details}
    public = {**cbor.decode(used["public"]), "commitment": entries.commitment(used["salt"], details)}
    odd = cbor.encode([])
    # What fits, and is not what the log has there: whether the service lies, or somebody changed the log's file.
    elsewhere: list[dict[str, bytes]] = [
        {**salted, "public": cbor.encode(public)},
        {**used, "public": cbor.encode({**cbor.decode(used["public"]), "kind": "usf"})},
        honest[place + 1],
    ]
    lies: list[dict[str, bytes]] = [
        salted, {**used, "salt": bytes(32)},
        {**used, "public": b""}, {**used, "details": b"\xff"}, {**used, "details": b""},
        {"public": used["public"], "salt": used["salt"]}, {**used, "more": b""}, {},
        {**used, "details": odd, "public": cbor.encode(
            {**public, "commitment": entries.commitment(used["salt"], odd)}
        )},
    ]  # fmt: skip
    answers: list[tuple[str, Told]] = [
        (code, [*honest[:place], lie, *honest[place + 1 :]])
        for code, told in (("log_inconsistent", lies), ("log_refused", elsewhere))
        for lie in told
    ]
    answers += [("log_inconsistent", []), ("log_inconsistent", [*honest, used])]
    answers += [("log_refused", honest[1:]), ("log_refused", honest[:1] + honest[2:])]
    tiles = Tiles(realm.state, realm.service.log)

    def fetch(path: str, _: int) -> bytes:
        return tiles.answer(path).body

    for code, answer in answers:
        got: list[int] = []

        def ask(request: EntriesRequest, answer: Told = answer) -> Entries:
            return Entries(answer[request.start :] if len(answer) == size else answer)

        with pytest.raises(LogRefused) as refused:
            got.extend(one.index for one in entries.read(ask, fetch, mine.certificate, 0))
        assert refused.value.code == code
        # Nothing false was told before it was noticed.
        assert len(got) <= place


def test_a_file_of_the_log_that_was_changed_on_the_way_is_no_lie_of_the_service(
    realm: Any, mine: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = Tiles(realm.state, realm.service.log)

    def changed(_: str, path: str, most: int) -> bytes:
        body = tiles.answer(path.removeprefix("/log/")).body
        return body if path.endswith("checkpoint") else bytes([body[0] ^ 1]) + body[1:]

    monkeypatch.setattr(owner, "fetch", changed)
    assert realm.code(lambda: list(mine.entries())) == "log_refused"


@pytest.mark.threat("LOG-24")
def test_the_checkpoint_is_of_the_certified_log(realm: Any, mine: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    note = sign_checkpoint(SigningKey.generate(), realm.state.certificate.origin, 1, bytes(32))
    monkeypatch.setattr(owner, "fetch", lambda *_, **__: note.encode())
    assert realm.code(lambda: next(mine.entries())) == "log_refused"


def test_on_the_command_line(
    realm: Any, mine: Owner, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    realm.owner.save(tmp_path / "owner.key")
    with realm.state.transaction() as database:
        realm.service.log.append(database, "other", {"text": "a\x1b[2Jb", "list": [b"\x01"], "none": None})
    capsys.readouterr()
    line = ["owner", "log", "--sign", str(tmp_path / "owner.key"), "--service", "unix:/s", "--lineage", "acme"]

    def run(*more: str) -> list[str]:
        main([*line, *more])
        lines = capsys.readouterr().out.splitlines()
        return [one for one in lines if "request.answered" not in one]

    entries = realm.entries()
    said = run()
    assert len(said) == len(entries)
    assert said[-1].endswith('UTC other: list ["01"], none null, text a?[2Jb')
    (use,) = run("--kind", "use", "--from", "2")
    assert 'settled: code "", asset a/b' in said[5]
    assert f"use: asset a/b, handle {entries[-2]['handle'].hex()}, bytes_out 256, operation op" in use
    (refused,) = run("--kind", "refused", "--json")
    body = json.loads(refused)
    assert (body["kind"], body["details"]["code"]) == ("use refused", "budget_exhausted")
    assert realm.public()[body["index"]]["time"] == body["time"]
