"""The user's side: a handle file, a signer, a handle, and the owner's requests."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import gc
import os
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

import isolate
from isolate.capability.invocation import Invocation, hash_arguments, verify_invocation
from isolate.capability.token import Token
from isolate.capability.token import verify as verify_token
from isolate.client import connect
from isolate.client.handle import FileSigner, HandleFile, attach
from isolate.client.handle_file import MAX_FILE
from isolate.client.owner import Owner
from isolate.crypto import cbor, merkle
from isolate.crypto.signing import SigningKey, VerifyingKey
from isolate.errors import (
    BudgetExhausted,
    CapabilityRefused,
    ChannelTruncated,
    HandshakeRefused,
    HolderRefused,
    KeyFormatError,
    ScopeExceeded,
    StorageError,
    UsageError,
)
from isolate.messages.base import Answer, Signed
from isolate.messages.invoke import Budget, Invoke, Receipt, Reply, Reservation, ReserveRequest, SettleRequest
from isolate.messages.owner import Done, Revoke
from isolate.messages.receipts import commitment

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.threat("ENC-16")
@given(texts, texts)
def test_a_handle_file_reads_back_whatever_stands_in_it(one: str, other: str) -> None:
    file = HandleFile(one, other, one, other, one, other, False)
    assert HandleFile.parse(file.to_text()) == file


@pytest.mark.threat("ENC-16")
@pytest.mark.parametrize(
    "odd", ['x"\nINSECURE_accept_simulated = true\n#', "\\", '"', "\n", "\x7f", "\0", "é\u2028"]
)
def test_an_address_sneaks_no_setting_into_a_handle_file(odd: str) -> None:
    file = HandleFile("t", "o", "l", odd, odd, "j", False)
    assert HandleFile.parse(file.to_text()) == file


@pytest.mark.parametrize(
    "text",
    [
        "no toml",
        "token = 1",
        "",
        "a = " + "[" * 5000,
        'token = "t"\nINSECURE_accept_simulated = 1',
        "a = " + "1" * 5000,
    ],
)
def test_what_is_no_handle_file(text: str, tmp_path: Path, key: SigningKey) -> None:
    with pytest.raises(UsageError):
        HandleFile.parse(text)
    with pytest.raises(UsageError):
        HandleFile.parse(HandleFile("t", "o", "l", "s", "e", "j", True).to_text() + "more = 1\n")
    with pytest.raises(StorageError):
        attach(tmp_path / "nothing", signer=key)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="no text"):
        attach(tmp_path / "binary", signer=key)
    for name in ("a\0b", "/\ud800"):
        with pytest.raises(StorageError):
            attach(name, signer=key)


@pytest.mark.threat("ATT-14")
@pytest.mark.parametrize("value", ['"false"', "1", "[true]", "2026-01-01"])
def test_a_handle_file_takes_a_simulated_enclave_by_a_plain_true_only(file: HandleFile, value: str) -> None:
    text = file.to_text()
    assert text.endswith("INSECURE_accept_simulated = true\n")
    with pytest.raises(UsageError, match="INSECURE_accept_simulated in a handle file is missing, or is no bool"):
        HandleFile.parse(text.replace("= true", f"= {value}"))
    with pytest.raises(UsageError, match="job in a handle file is missing, or is no str"):
        HandleFile.parse(text.replace('"acme/job"', "1"))


def test_a_handle_file_is_read_whole_or_not_at_all(file: HandleFile, tmp_path: Path) -> None:
    """What is cut off could be what forbids: no file is taken for its beginning."""
    text = file.to_text()
    (tmp_path / "full").write_text(text + "#" * (MAX_FILE - len(text)))
    assert HandleFile.load(tmp_path / "full") == file
    (tmp_path / "long").write_text(text + "#" * (MAX_FILE - len(text) + 1))
    for path in (tmp_path / "long", Path("/dev/zero")):
        with pytest.raises(UsageError, match="too long"):
            HandleFile.load(path)


def test_a_handle_file_that_cannot_be_written_leaves_nothing(
    file: HandleFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a\0b", "/\ud800", "nowhere/team.handle"):
        with pytest.raises(StorageError):
            file.save(tmp_path / name)
    with pytest.raises(StorageError, match="no text"):
        evolve(file, job="\ud800").save(tmp_path / "odd")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file.save(tmp_path / "good")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space"):
        file.save(tmp_path / "full")
    with pytest.raises(StorageError, match="exists"):
        file.save(tmp_path / "good")
    assert not {path.name for path in tmp_path.iterdir()} & {"a", "odd", "full"}
    assert HandleFile.load(tmp_path / "good") == file


def test_attaching(file: HandleFile, key: SigningKey, tmp_path: Path) -> None:
    (tmp_path / "team.handle").write_text(file.to_text(), encoding="utf-8")
    key.save(tmp_path / "me.key")
    handle = attach(tmp_path / "team.handle", signer=FileSigner(tmp_path / "me.key"))
    assert repr(handle) == "<Handle on a/b: more, op; at most 9 uses>"
    assert attach(handle.export(), signer=key).id == handle.id
    with pytest.raises(HolderRefused):
        attach(file, signer=SigningKey.generate())
    with pytest.raises(CapabilityRefused):
        attach(evolve(file, token="isolate-token-x"), signer=key)
    with pytest.raises(KeyFormatError):
        attach(evolve(file, owner="nobody"), signer=key)
    for signer in (None, "me.key", SigningKey, tmp_path / "me.key"):
        with pytest.raises(UsageError, match="FileSigner"):
            attach(file, signer=signer)  # type: ignore[arg-type]


def test_narrowing_is_offline_and_never_widens(file: HandleFile, key: SigningKey, realm: Any) -> None:
    before = len(realm.carried)
    handle, other = attach(file, signer=key), SigningKey.generate()
    narrowed = handle.attenuate(operations=["op"], uses=50, holder=other.verifying_key.ed25519)
    with pytest.raises(ScopeExceeded):
        handle.attenuate(operations=["none"])
    with pytest.raises(UsageError, match="a list"):
        handle.attenuate(operations="op")
    assert repr(attach(narrowed, signer=other)) == "<Handle on a/b: op; at most 9 uses>"
    with pytest.raises(ScopeExceeded):
        attach(narrowed, signer=other).attenuate(operations=["more"])
    for passed_on in (handle.attenuate(holder=key.verifying_key.ed25519), narrowed):
        assert isinstance(passed_on, HandleFile)  # to pass on: whether it is one's own key is not guessed
    assert len(realm.carried) == before


def test_a_narrower_handle_of_ones_own_is_used_at_once(file: HandleFile, key: SigningKey) -> None:
    handle = attach(file, signer=key)
    small = handle.attenuate(operations=["op"], uses=2)
    assert repr(small) == "<Handle on a/b: op; at most 2 uses>"
    assert small.id != handle.id and Token.from_text(small.export().token).handles[0] == handle.id
    assert attach(small.export(), signer=key).id == small.id


def test_an_error_is_gone_when_nobody_holds_it(file: HandleFile, key: SigningKey) -> None:
    """With what its traceback holds: the caller's frames, and their locals. No round of gc is waited for."""
    handle, asked = attach(file, signer=key), asyncio.run(isolate.aio.attach(file, signer=key))
    gone = []
    gc.disable()
    try:
        for attempt in (lambda: handle.invoke("none"), lambda: asked.invoke("none").send(None)):
            with contextlib.suppress(ScopeExceeded):
                try:
                    attempt()
                except ScopeExceeded as error:
                    gone.append(weakref.ref(error))
                    raise
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_using(file: HandleFile, key: SigningKey, wires: list[Any]) -> None:
    with attach(file, signer=key) as handle:
        assert handle.invoke("op", image=np.arange(3, dtype=np.uint8)) == 3
        assert handle.invoke("op", number=1) == 3
        with pytest.raises(ScopeExceeded):
            handle.invoke("none")
        with pytest.raises(UsageError):
            handle.invoke("op", number=1.5)
    one, two = wires[1].seen
    assert one.arguments == {"image": b"\0\1\2"}
    counters = [Invocation.parse(seen.invocation).counter for seen in (one, two)]
    assert counters == [1, 2]
    assert wires[1].closed


def test_an_invocation_is_for_this_channel_and_these_arguments(
    file: HandleFile, key: SigningKey, wires: list[Any]
) -> None:
    with attach(file, signer=key) as handle:
        for number in (1, 1):
            handle.invoke("op", number=number)
    token = verify_token(Token.from_text(file.token), VerifyingKey.parse(file.owner).ed25519, now=0)
    nonces = set()
    for seen in wires[1].seen:
        made = verify_invocation(
            Invocation.parse(seen.invocation), token, channel_binding=wires[1].binding,
            argument_hash=hash_arguments(cbor.encode({"number": 1})),
        )  # fmt: skip
        assert (made.operation, made.operation_digest) == ("op", b"d" * 32)
        nonces.add(made.nonce)
    assert len(nonces) == 2


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("budget_exhausted", BudgetExhausted), ("replayed", CapabilityRefused),
        ("unknown_operation", CapabilityRefused), ("operation_failed", CapabilityRefused),
        ("scope_exceeded", ScopeExceeded), ("Bad Code", CapabilityRefused),
    ],
)  # fmt: skip
def test_a_refusal_becomes_its_error(
    file: HandleFile, key: SigningKey, wires: list[Any], code: str, error: type[Exception]
) -> None:
    wires[0].answer = lambda _: Reply(code, None, "request-1")
    with pytest.raises(error) as refused:
        attach(file, signer=key).invoke("op")
    assert refused.value.request_id == "request-1"  # type: ignore[attr-defined]


def test_after_a_channel_ended_the_next_use_opens_another(
    file: HandleFile, key: SigningKey, wires: list[Any]
) -> None:
    handle = attach(file, signer=key)
    wires[0].answer = lambda _: ChannelTruncated("cut")
    with pytest.raises(ChannelTruncated):
        handle.invoke("op")
    wires[0].answer = lambda _: Reply("", 5, "id")
    assert handle.invoke("op") == 5
    assert (len(wires), wires[1].closed) == (3, True)
    assert Invocation.parse(wires[2].seen[0].invocation).counter == 1


class Stop(BaseException):
    """As an interrupt from the keyboard, which would end the tests too."""


@pytest.mark.threat("HND-7")
@pytest.mark.parametrize("stop", [Stop(), ChannelTruncated("cut"), RuntimeError("from a signal")])
def test_an_interrupted_use_leaves_no_reply_for_the_next(
    stop: BaseException, file: HandleFile, key: SigningKey, wires: list[Any]
) -> None:
    handle = attach(file, signer=key)
    wires[0].answer = lambda _: stop
    with pytest.raises(type(stop)):
        handle.invoke("op")
    wires[0].answer = lambda _: Reply("", 5, "id")
    assert handle.invoke("op") == 5
    assert (len(wires), wires[1].closed) == (3, True)


@pytest.mark.threat("ENC-17")
def test_threads_get_each_its_own_reply(file: HandleFile, key: SigningKey, wires: list[Any]) -> None:
    wires[0].answer = lambda seen: Reply("", seen.arguments["number"], "id")
    handle, wrong = attach(file, signer=key), list[int]()

    def use(numbers: range) -> None:
        wrong.extend(number for number in numbers if handle.invoke("op", number=number) != number)

    threads = [threading.Thread(target=use, args=(range(at, at + 20),)) for at in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    counters = [Invocation.parse(seen.invocation).counter for seen in wires[1].seen]
    assert (wrong, counters) == ([], list(range(1, 61)))


@pytest.mark.threat("ENC-18")
def test_a_handle_and_a_signer_show_and_give_away_nothing(
    file: HandleFile, key: SigningKey, tmp_path: Path
) -> None:
    key.save(tmp_path / "me.key")
    signer = FileSigner(tmp_path / "me.key")
    handle = attach(file, signer=signer)
    for thing in (handle, signer):
        for copies in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(UsageError):
                copies(thing)
        seed = bytes(key._seed.expose())
        for text in (repr(thing), str(thing), f"{thing}", handle.export().to_text()):
            assert seed.hex() not in text
            assert "ISOLATE-SIGNING-KEY" not in text


def test_a_budget_is_the_services_signed_answer(
    file: HandleFile, key: SigningKey, realm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = attach(file, signer=key)
    assert handle.budget.uses == 9
    first: dict[str, Any] = {}

    def old(route: str, body: bytes) -> Any:
        # A courier that shows the first answer ever after, as if nothing had been used since.
        return first.setdefault(route, realm.serve(route, body))

    realm.courier = old
    assert handle.budget.uses == 9
    assert realm.code(lambda: handle.budget) == "forged_answer"

    def lie(route: str, body: bytes) -> tuple[int, bytes]:
        if route != "budget":
            return realm.serve(route, body)  # type: ignore[no-any-return]
        return 200, Answer.make(Signed.parse(body), Budget(999, None), SigningKey.generate()).encode()

    realm.courier = lie
    assert realm.code(lambda: handle.budget) == "forged_answer"


def settled(realm: Any, sent: Invoke, code: str = "") -> bytes:
    """Have a use reserved and settled, as the enclave does that it was sent to; answers its id."""
    enclave, hashed = realm.enclave(), hash_arguments(cbor.encode(sent.arguments))
    request = ReserveRequest(sent.token, sent.invocation, b"b" * 32, hashed, 512)
    made = realm.ask("reserve", realm.signed_by(enclave, request), Reservation).invocation
    realm.ask("settle", realm.signed_by(enclave, SettleRequest(made, 256, code)), Receipt)
    return bytes(made)


@pytest.mark.threat("BUD-4")
def test_a_receipt_is_the_services_and_for_the_use_that_was_asked_for(
    file: HandleFile, key: SigningKey, realm: Any, wires: list[Any]
) -> None:
    realm.asset()
    handle = attach(file, signer=key)
    assert realm.code(handle.receipt) == realm.code(lambda: handle.receipt(b"short")) == "usage"
    handle.invoke("op", number=1)
    first = handle.last_use
    assert realm.code(handle.receipt) == "unknown_reservation"
    assert settled(realm, wires[1].seen[0]) == first
    wires[1].answer = lambda _: Reply("operation_failed", None, "id")
    with pytest.raises(CapabilityRefused):
        handle.invoke("op", number=2)
    second = settled(realm, wires[1].seen[1], "operation_failed")
    assert second == handle.last_use != first
    one, two = handle.receipt(first).settled, handle.receipt().settled
    assert [(use.invocation, use.bytes_out, use.code) for use in (one, two)] == [
        (first, 256, ""), (second, 256, "operation_failed"),
    ]  # fmt: skip
    assert asyncio.run(isolate.aio.AsyncHandle(file, key).receipt(first)).settled.invocation == first
    # A service that answers with another use's receipt, and one that signs with another key than is certified.
    release = realm.state.release_key
    other, forger = realm.service.budgets.receipt(first, key.verifying_key.ed25519), SigningKey.generate()
    forged = evolve(other, receipt=evolve(other.settled, invocation=second).sign(forger).encode())
    # One that says of another asset's use that it was this one.
    details = cbor.encode({**other.about, "invocation": second, "asset": "another"})
    entry = cbor.encode({"kind": "settled", "time": 0, "commitment": commitment(other.salt, details)})
    signed = evolve(other.settled, invocation=second, leaf=merkle.leaf_hash(entry)).sign(release)
    elsewhere = evolve(other, receipt=signed.encode(), entry=entry, details=details)
    for lie in (other, forged, elsewhere, evolve(other, receipt=b"")):
        realm.courier = lambda route, body, lie=lie: (
            (200, Answer.make(Signed.parse(body), lie, release).encode())
            if route == "receipt"
            else realm.serve(route, body)
        )
        for attempt in (handle.receipt, lambda: asyncio.run(isolate.aio.AsyncHandle(file, key).receipt(second))):
            assert realm.code(attempt) == ("malformed" if lie.receipt == b"" else "log_refused")


def test_a_client_pins_the_job_its_policies_and_who_attests(owner: Owner) -> None:
    found = owner.certificate
    for simulated in (False, True):
        pins = connect.expect_enclave(found, job="j", least_sequence=7, INSECURE_accept_simulated=simulated)
        assert (pins.job, pins.lineage, pins.least_sequence) == ("j", "acme", 7)
        assert (pins.issuer_key, pins.clock) == (found.result_key.ed25519, connect.now)
        assert pins.INSECURE_accept_simulated is simulated


def test_an_address_that_is_none_is_used_wrongly(house: Any, key: SigningKey) -> None:
    good = house.grant(key)
    for address in ("", "nowhere", "tcp:a..b:1", "tcp:a\0b:1", "tcp:h:" + "1" * 5000, "unix:/a\0b", "unix:/\ud800"):
        file = evolve(good, enclave=address)
        with pytest.raises(UsageError, match="no address"):
            attach(file, signer=key).invoke("op")
        handle = asyncio.run(isolate.aio.attach(file, signer=key))
        with pytest.raises(UsageError, match="no address"):
            asyncio.run(handle.invoke("op"))


@pytest.mark.threat("ATT-14")
def test_a_simulated_enclave_is_refused_unless_the_handle_file_takes_one(house: Any, key: SigningKey) -> None:
    taken = house.grant(key)
    refusing = evolve(taken, INSECURE_accept_simulated=False)
    with attach(taken, signer=key) as handle:
        assert handle.invoke("op", number=1) == 1
    with pytest.raises(HandshakeRefused) as refused:
        attach(refusing, signer=key).invoke("op", number=1)
    assert refused.value.code == "result_simulated"

    async def use(file: HandleFile) -> Any:
        async with await isolate.aio.attach(file, signer=key) as handle:
            return await handle.invoke("op", number=1)

    assert asyncio.run(use(taken)) == 1
    with pytest.raises(HandshakeRefused) as refused:
        asyncio.run(use(refusing))
    assert refused.value.code == "result_simulated"


@pytest.mark.threat("ENC-1")
def test_a_client_believes_only_a_certified_service_and_now(realm: Any, file: HandleFile, key: SigningKey) -> None:
    stranger = str(SigningKey.generate().verifying_key)
    assert realm.code(lambda: attach(evolve(file, owner=stranger), signer=key).budget) == "service_uncertified"
    assert realm.code(lambda: attach(evolve(file, lineage="x"), signer=key).budget) == "service_uncertified"
    realm.clock.now = realm.state.certificate.not_after
    root = realm.owner.verifying_key
    assert realm.code(lambda: connect.certificate("", root, "acme")) == "service_expired"


@pytest.mark.threat("SVC-27")
def test_an_owner_learns_that_a_revocation_was_suppressed(realm: Any, owner: Owner) -> None:
    assert owner.revoke(bytes(32)) == 1
    done = realm.serve("owner/revoke", realm.owner_request(Revoke(b"1" * 32)).encode())
    realm.courier = lambda *_: done
    assert realm.code(lambda: owner.revoke(b"2" * 32)) == "forged_answer"
    realm.courier = lambda _, body: (200, Answer.make(Signed.parse(body), Done(1), SigningKey.generate()).encode())
    assert realm.code(lambda: owner.revoke(b"2" * 32)) == "forged_answer"


def test_an_owner_works(realm: Any, owner: Owner) -> None:
    path = realm.seal()
    registered = owner.register(path)
    assert owner.newest("a/b") == registered
    owner.set_rule("a/b", readers=["reader"])
    owner.set_policy(realm.policy())
    assert owner.evidence(realm.enclave().result.instance)
    assert owner.log(index=0).entry
    assert repr(owner) == "Owner('acme', unix:/service)"
    with pytest.raises(UsageError, match="not copied"):
        pickle.dumps(owner)
    assert realm.code(lambda: owner.newest("none")) == "usage"
