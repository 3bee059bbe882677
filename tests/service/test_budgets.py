"""Reserving a use: the first six numbered checks of service/budgets.py, and the attacks on them; revocation."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from attrs import evolve

from isolate.capability.scope import Scope
from isolate.crypto.signing import SigningKey
from isolate.errors import IsolateError, MalformedError
from isolate.messages.base import Signed
from isolate.messages.invoke import MAX_BYTES_OUT, Budget, Reservation, SettleRequest
from isolate.messages.owner import Revoke
from isolate.service import budgets


def test_a_use_is_charged_logged_and_receipted(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, uses=3, bytes_out=600)
    request = realm.use(token, holder)
    receipt = till.send(request)
    assert till.left(token, holder) == Budget(2, 344)
    (entry,) = realm.entries("use")
    assert (entry["asset"], entry["operation"], entry["handle"]) == ("a/b", "op", token.id)
    (settled,) = realm.entries("settled")
    assert (settled["invocation"], settled["bytes_out"], settled["code"]) == (receipt.invocation, 256, "")
    receipt.verify(realm.state.certificate, SettleRequest(receipt.invocation, 256, ""))


@pytest.mark.threat("SVC-17")
def test_check_1_a_token_of_another_owner_an_expired_one_and_rubbish(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    stranger = SigningKey.generate()
    mine, realm.owner = realm.owner, stranger
    forged = realm.grant(holder)
    realm.owner = mine
    assert till.use(forged, holder) == "capability_refused"
    token = realm.grant(holder, expires=realm.clock() + 10)
    request = realm.use(token, holder)
    realm.clock.now += 10
    assert till.code(request) == "expired"
    # Set back, the clock brings nothing back.
    realm.clock.now -= 10
    assert till.code(realm.use(token, holder)) == "expired"
    assert till.code(evolve(request, token=b"rubbish")) == "token_malformed"
    fresh = realm.use(realm.grant(holder), holder)
    assert till.code(evolve(fresh, invocation=b"rubbish")) == "invocation_malformed"


@pytest.mark.threat("SVC-17")
def test_check_1_a_limit_that_nobody_enforces(
    realm: Any, till: Any, holder: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = realm.grant(holder)
    monkeypatch.setattr(budgets, "ENFORCED", budgets.ENFORCED - {"minimum_group"})
    assert till.use(token.attenuate(holder, Scope(minimum_group=5)), holder) == "not_enforced"
    assert till.use(token, holder) == ""


@pytest.mark.threat("SVC-17")
def test_check_2_an_invocation_by_another_for_another_channel_arguments_or_operation(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    token, other = realm.grant(holder), SigningKey.generate()
    good = realm.use(token, holder)
    assert till.code(evolve(good, channel_binding=b"x" * 32)) == "holder_refused"
    assert till.code(evolve(good, argument_hash=b"x" * 32)) == "holder_refused"
    assert till.code(evolve(realm.use(realm.grant(other), other), token=token.encode())) == "holder_refused"
    assert till.use(token, holder, operation="more") == "scope_exceeded"
    assert till.use(token, holder, operation_digest=b"e" * 32) == "scope_exceeded"
    assert not realm.entries("use")


@pytest.mark.threat("SVC-17")
def test_check_3_an_asset_that_the_enclave_may_not_read(realm: Any, till: Any, holder: SigningKey) -> None:
    assert till.use(realm.grant(holder, asset="c/d"), holder) == "rule_denied"
    realm.rule("a/b")
    assert till.use(realm.grant(holder), holder) == "rule_denied"


@pytest.mark.threat("SVC-18")
def test_check_4_a_revoked_handle_and_a_revoked_ancestor(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder)
    child = token.attenuate(holder, Scope(uses=5))
    sibling = token.attenuate(holder, Scope(uses=6))
    realm.tell("revoke", Revoke(child.id))
    assert till.use(child, holder) == "revoked"
    assert till.use(child.attenuate(holder, Scope()), holder) == "revoked"
    assert till.use(sibling, holder) == ""
    realm.tell("revoke", Revoke(token.id))
    assert till.use(sibling, holder) == "revoked"
    assert realm.code(lambda: till.left(sibling, holder)) == "revoked"
    realm.reopen()
    assert till.use(token, holder) == "revoked"


@pytest.mark.threat("SVC-19")
def test_check_5_a_charge_replayed(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, uses=10)
    request = realm.use(token, holder)
    assert till.code(request) == ""
    # By the same enclave in a fresh request, by another enclave, and after a restart.
    assert till.code(request) == "replayed"
    assert type(till)(realm, realm.enclave(rank=1)).code(request) == "replayed"
    realm.reopen()
    assert till.code(request) == "replayed"
    assert till.left(token, holder).uses == 9


@pytest.mark.threat("SVC-20")
def test_check_6_uses_and_bytes_are_spent(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, uses=2)
    assert [till.use(token, holder) for _ in range(3)] == ["", "", "budget_exhausted"]
    token = realm.grant(holder, bytes_out=600)
    assert [till.use(token, holder) for _ in range(3)] == ["", "", "budget_exhausted"]
    assert till.left(token, holder) == Budget(None, 88)
    # To the byte.
    assert [till.use(token, holder, bytes_out=size) for size in (89, 88, 1, 0)] == [
        "budget_exhausted", "", "budget_exhausted", "",
    ]  # fmt: skip


@pytest.mark.threat("SVC-20")
def test_check_6_oversubscribed_siblings_share_what_their_ancestor_has(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    token = realm.grant(holder, uses=4)
    children = [token.attenuate(holder, Scope(uses=3)) for _ in range(3)]
    codes = [till.use(child, holder) for child in children for _ in range(3)]
    assert codes.count("") == 4
    assert codes[:4] == [""] * 4
    assert set(codes[4:]) == {"budget_exhausted"}
    assert [till.left(child, holder).uses for child in children] == [0, 0, 0]
    assert till.left(token, holder).uses == 0


@pytest.mark.threat("SVC-20")
def test_check_6_many_at_once_never_overspend(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, uses=5)
    requests = [realm.signed_by(till.enclave, realm.use(token, holder)) for _ in range(16)]
    codes: list[str] = []

    def charge(some: list[Signed]) -> None:
        for one in some:
            codes.append(realm.code(lambda one=one: realm.ask("reserve", one, Reservation)))

    threads = [threading.Thread(target=charge, args=(requests[at::4],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (codes.count(""), codes.count("budget_exhausted")) == (5, 11)


@pytest.mark.threat("SVC-21")
def test_a_crash_between_charge_and_reply_loses_budget_and_never_mints_it(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    token = realm.grant(holder, uses=3)
    request = realm.use(token, holder)

    def lose_the_answer(route: str, body: bytes) -> tuple[int, bytes]:
        realm.serve(route, body)
        realm.reopen()
        raise ConnectionError

    realm.courier = lose_the_answer
    with pytest.raises(ConnectionError):
        till.reserve(request)
    realm.courier = realm.serve
    assert till.left(token, holder).uses == 2
    assert till.code(request) == "replayed"
    assert till.left(token, holder).uses == 2


@pytest.mark.threat("SVC-21")
def test_a_charge_that_cannot_be_committed_gives_no_receipt(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, uses=3)
    request, real = realm.use(token, holder), realm.state._database
    for statement in ("COMMIT", "RELEASE", "INSERT INTO reservation", "INSERT INTO account", "INSERT INTO node"):
        realm.fail(statement)
        assert till.code(request) == "storage"
        realm.state._database = real
        assert till.left(token, holder).uses == 3
    assert till.code(request) == ""


@pytest.mark.threat("SVC-22")
def test_an_impostors_receipt_is_none(realm: Any, till: Any, holder: SigningKey) -> None:
    receipt = till.send(realm.use(realm.grant(holder), holder))
    certificate, asked = realm.state.certificate, SettleRequest(receipt.invocation, 256, "")
    receipt.verify(certificate, asked)
    with pytest.raises(IsolateError) as refused:
        receipt.sign(SigningKey.generate()).verify(certificate, asked)
    assert refused.value.code == "receipt_refused"


@pytest.mark.threat("SVC-6")
def test_refused_uses_grow_the_log_with_their_logarithm_only(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, uses=0)
    for _ in range(9):
        # Narrowed handles are free: they do not make a refusal new.
        assert till.use(token.attenuate(holder, Scope()), holder) == "budget_exhausted"
    found = realm.entries("use refused")
    assert [(one["count"], one["code"]) for one in found] == [(n, "budget_exhausted") for n in (1, 2, 4, 8)]


@pytest.mark.threat("SVC-6")
def test_refused_settlements_grow_the_log_with_their_logarithm_only(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    token = realm.grant(holder)
    narrowed = [token.attenuate(holder, Scope()) for _ in range(5)]
    numbers = [till.reserve(realm.use(one, holder)).invocation for one in narrowed]
    realm.tell("revoke", Revoke(token.id))
    assert {realm.code(lambda one=one: till.settle(one)) for one in numbers} == {"revoked"}
    assert [one["count"] for one in realm.entries("settle refused")] == [1, 2, 4]


def test_revocations_are_numbered_and_say_what_came_first(realm: Any, till: Any, holder: SigningKey) -> None:
    token, other = realm.grant(holder), realm.grant(holder)
    before = till.send(realm.use(token, holder))
    done = [realm.tell("revoke", Revoke(one.id)) for one in (token, other, token)]
    assert [one["number"] for one in realm.entries("revoke")] == [1, 2, 2]  # the same one again is no new one
    assert before.log_index < done[0].log_index < done[1].log_index < done[2].log_index


def test_a_budget_is_told_to_its_holder_only(realm: Any, till: Any, holder: SigningKey) -> None:
    token, rows = realm.grant(holder, uses=7), realm.rows()
    assert realm.code(lambda: till.left(token, SigningKey.generate())) == "holder_refused"
    assert till.left(token, holder).uses == 7
    # Any key can sign such a request, so none of them leaves a row.
    assert realm.rows() == rows


def test_numbers_that_no_account_holds(realm: Any, holder: SigningKey) -> None:
    token = realm.grant(holder)
    for bytes_out in (-1, MAX_BYTES_OUT + 1, 2**64 - 1):
        with pytest.raises(MalformedError):
            realm.use(token, holder, bytes_out=bytes_out)
