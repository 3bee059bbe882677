"""Settling a use: checks 7 to 10 of service/budgets.py, what is given back, and what the log keeps of it."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from isolate import sealed
from isolate.capability.scope import Scope
from isolate.crypto.signing import SigningKey
from isolate.errors import IsolateError, LogRefused, Revoked
from isolate.messages.attest import Registered
from isolate.messages.derive import DeriveRequest, derived_name
from isolate.messages.invoke import Budget, Receipt, SettleRequest
from isolate.messages.owner import ExplainRequest, Explanation, Revoke
from isolate.service.explain import CHECKS
from isolate.service.head import Head


@pytest.mark.threat("BUD-1")
def test_bytes_that_were_not_needed_come_back_and_nothing_else(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, uses=3, bytes_out=1000)
    child = token.attenuate(holder, Scope(bytes_out=900))
    number = till.reserve(realm.use(child, holder, bytes_out=800)).invocation
    assert till.left(child, holder) == Budget(2, 100)
    till.settle(number, 256)
    assert till.left(child, holder) == Budget(2, 644)
    assert till.left(token, holder) == Budget(2, 744)


@pytest.mark.threat("BUD-1")
def test_a_failed_operation_is_charged(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, uses=2, bytes_out=1000)
    number = till.reserve(realm.use(token, holder)).invocation
    till.settle(number, 256, "operation_failed")
    assert till.left(token, holder) == Budget(1, 744)
    (entry,) = realm.entries("settled")
    assert entry["code"] == "operation_failed"


@pytest.mark.threat("BUD-2")
def test_check_7_only_the_instance_that_reserved_settles(realm: Any, tills: Any, holder: SigningKey) -> None:
    one, other = tills
    token = realm.grant(holder, bytes_out=1000)
    number = one.reserve(realm.use(token, holder, bytes_out=800)).invocation
    for attempt in (
        lambda: other.settle(number, 0),
        lambda: one.settle(b"n" * 32),
        lambda: type(one)(realm, realm.enclave(rank=0)).settle(number, 0),  # a restart: another instance
    ):
        assert realm.code(attempt) == "unknown_reservation"
    assert one.left(token, holder).bytes_out == 200


@pytest.mark.threat("BUD-2")
def test_check_7_the_confused_deputy(realm: Any, till: Any, holder: SigningKey) -> None:
    """An enclave of another measurement has a user's invocation, and a token for what it may not read itself."""
    token = realm.grant(holder)
    deputy = type(till)(realm, realm.enclave("other", rank=5))
    assert deputy.use(token, holder) == "rule_denied"
    # What a user gave to the deputy is bound to the deputy's channel: handed on, it is no use of anybody's.
    handed = realm.use(token, holder, channel_binding=b"d" * 32)
    assert till.code(evolve(handed, channel_binding=b"b" * 32)) == "holder_refused"
    assert not realm.entries("use")


@pytest.mark.threat("SVC-19")
def test_check_8_a_use_is_settled_once(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, bytes_out=1000)
    number = till.reserve(realm.use(token, holder, bytes_out=800)).invocation
    till.settle(number, 500)
    for bytes_out in (500, 0, 800):
        assert realm.code(lambda bytes_out=bytes_out: till.settle(number, bytes_out)) == "replayed"
    realm.reopen()
    assert realm.code(lambda: till.settle(number, 0)) == "replayed"
    assert till.left(token, holder).bytes_out == 500


@pytest.mark.threat("BUD-3")
def test_check_9_no_more_leaves_than_was_reserved(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, bytes_out=1000)
    number = till.reserve(realm.use(token, holder, bytes_out=256)).invocation
    assert realm.code(lambda: till.settle(number, 257)) == "output_refused"
    assert till.left(token, holder).bytes_out == 744
    till.settle(number, 256)


@pytest.mark.threat("SVC-18")
@pytest.mark.parametrize("which", ["handle", "ancestor"])
def test_check_10_revocation_during_a_long_operation(realm: Any, till: Any, holder: SigningKey, which: str) -> None:
    token = realm.grant(holder, bytes_out=1000)
    child = token.attenuate(holder, Scope())
    number = till.reserve(realm.use(child, holder, bytes_out=800)).invocation
    realm.tell("revoke", Revoke({"handle": child.id, "ancestor": token.id}[which]))
    assert realm.code(lambda: till.settle(number, 0)) == "revoked"
    assert not realm.entries("settled")
    (refused,) = realm.entries("settle refused")
    assert (refused["code"], refused["invocation"]) == ("revoked", number)
    if which == "handle":
        assert till.left(token, holder).bytes_out == 200  # and nothing came back


@pytest.mark.threat("SVC-18")
def test_check_10_a_handle_that_expires_and_a_rule_that_is_taken_back_meanwhile(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    token = realm.grant(holder, expires=realm.clock() + 10)
    late, denied = (till.reserve(realm.use(token, holder)).invocation for _ in range(2))
    realm.rule("a/b")
    assert realm.code(lambda: till.settle(denied)) == "rule_denied"
    realm.rule("a/b", readers=("reader",))
    realm.clock.now += 10
    assert realm.code(lambda: till.settle(late)) == "expired"
    realm.clock.now -= 10  # a clock that is set back brings nothing back
    assert realm.code(lambda: till.settle(denied)) == "expired"
    assert not realm.entries("settled")


@pytest.mark.threat("SVC-21")
def test_an_open_reservation_stays_spent_over_a_restart_of_either_side(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    token = realm.grant(holder, uses=2, bytes_out=1000)
    till.reserve(realm.use(token, holder, bytes_out=800))
    realm.reopen()
    again = type(till)(realm, realm.enclave(rank=1))
    assert again.left(token, holder) == Budget(1, 200)
    assert again.use(token, holder, bytes_out=800) == "budget_exhausted"


@pytest.mark.threat("SVC-21")
def test_a_settlement_that_cannot_be_committed_gives_no_receipt(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, bytes_out=1000)
    number, real = till.reserve(realm.use(token, holder, bytes_out=800)).invocation, realm.state._database
    for statement in ("COMMIT", "RELEASE", "UPDATE account", "UPDATE reservation", "INSERT INTO node"):
        realm.fail(statement)
        assert realm.code(lambda: till.settle(number)) == "storage"
        realm.state._database = real
        assert till.left(token, holder).bytes_out == 200
    till.settle(number)
    assert till.left(token, holder).bytes_out == 744


@pytest.mark.threat("SVC-20")
def test_two_enclaves_at_once_never_overspend_together(realm: Any, tills: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, uses=7, bytes_out=7 * 256)
    children = [token.attenuate(holder, Scope(uses=5)) for _ in range(2)]
    codes: list[str] = []

    def work(till: Any, child: Any) -> None:
        codes.extend(till.use(child, holder) for _ in range(6))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(tills, children, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (codes.count(""), len(codes)) == (7, 12)
    assert set(codes) == {"", "budget_exhausted"}
    assert tills[0].left(token, holder) == Budget(0, 0)


@pytest.mark.threat("SVC-19")
def test_check_8_by_many_at_once_a_use_is_settled_once(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, bytes_out=1000)
    number = till.reserve(realm.use(token, holder, bytes_out=800)).invocation
    asked = [realm.signed_by(till.enclave, SettleRequest(number, size, "")) for size in (0, 100, 800, 0, 400, 1)]

    def settle(one: Any) -> Any:
        try:
            return realm.ask("settle", one, Receipt).bytes_out
        except IsolateError as error:
            return error.code

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(settle, asked))
    (size,) = (one for one in found if one != "replayed")
    assert till.left(token, holder).bytes_out == 1000 - size


@pytest.mark.threat("SVC-18")
def test_check_10_no_receipt_comes_after_a_revocation_that_races_with_it(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    for _ in range(3):
        token = realm.grant(holder)
        numbers = [till.reserve(realm.use(token, holder)).invocation for _ in range(5)]
        asked = [realm.signed_by(till.enclave, SettleRequest(one, 256, "")) for one in numbers]
        tasks: list[Any] = [lambda one=one: realm.ask("settle", one, Receipt).log_index for one in asked]
        tasks.insert(2, lambda token=token: realm.tell("revoke", Revoke(token.id)).log_index)
        with ThreadPoolExecutor(len(tasks)) as pool:
            done = [pool.submit(task) for task in tasks]
        ended = done.pop(2).result()
        for one in done:
            error = one.exception()
            assert one.result() < ended if error is None else isinstance(error, Revoked)


def test_a_receipt_is_for_what_was_settled(realm: Any, till: Any, holder: SigningKey) -> None:
    number = till.reserve(realm.use(realm.grant(holder), holder)).invocation
    receipt = till.settle(number, 100, "output_refused")
    assert (receipt.bytes_out, receipt.code) == (100, "output_refused")
    receipt.verify(realm.state.certificate, SettleRequest(number, 100, "output_refused"))


@pytest.mark.threat("BUD-5")
def test_a_restored_database_would_mint_budget_and_is_seen_at_start(
    realm: Any, till: Any, holder: SigningKey, tmp_path: Path
) -> None:
    token = realm.grant(holder, uses=2)
    assert till.use(token, holder) == ""
    realm.state.close()
    shutil.copytree(realm.folder / "state", tmp_path / "old")
    realm.open()
    with Head(realm.state, realm.service.log, tmp_path / "head", first=True):
        assert till.use(token, holder) == ""
        assert till.use(token, holder) == "budget_exhausted"
    realm.state.close()
    shutil.rmtree(realm.folder / "state")
    shutil.copytree(tmp_path / "old", realm.folder / "state")
    realm.open()
    # This is what it would be worth, and why it is not served.
    assert till.left(token, holder).uses == 1
    with pytest.raises(LogRefused) as refused:
        Head(realm.state, realm.service.log, tmp_path / "head")
    assert refused.value.code == "log_shrunk"


def test_each_check_of_reserve_and_settle_is_explained_by_its_number(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    token = realm.grant(holder, uses=20)
    good = realm.use(token, holder)
    spent = realm.grant(holder, uses=0)
    ended = realm.grant(holder)
    realm.tell("revoke", Revoke(ended.id))
    done = till.reserve(realm.use(token, holder)).invocation
    till.settle(done)
    opened, late = (till.reserve(realm.use(token, holder)).invocation for _ in range(2))
    deputy = type(till)(realm, realm.enclave("other", rank=3))
    tried: list[tuple[str, int, Any]] = [
        ("reserve", 7, lambda: till.reserve(evolve(good, token=b"rubbish"))),
        ("reserve", 8, lambda: till.reserve(evolve(good, argument_hash=b"x" * 32))),
        ("reserve", 9, lambda: deputy.reserve(good)),
        ("reserve", 10, lambda: till.reserve(realm.use(ended, holder))),
        ("reserve", 11, lambda: (till.reserve(good), till.reserve(good))),
        ("reserve", 12, lambda: till.reserve(realm.use(spent, holder))),
        ("settle", 7, lambda: deputy.settle(opened)),
        ("settle", 8, lambda: till.settle(done)),
        ("settle", 9, lambda: till.settle(opened, 257)),
        ("settle", 10, lambda: (realm.tell("revoke", Revoke(token.id)), till.settle(late))),
    ]
    for route, number, attempt in tried:
        with pytest.raises(IsolateError) as refused:
            attempt()
        found = realm.tell("explain", ExplainRequest(refused.value.request_id), Explanation)
        assert (found.route, found.code) == (route, refused.value.code)
        failed = [(one["number"], one["name"]) for one in found.checks if one["passed"] is False]
        assert failed == [(number, CHECKS[route][number - 1])]


@pytest.mark.threat("ENC-39")
def test_a_use_makes_one_derived_asset(realm: Any, till: Any, holder: SigningKey) -> None:
    number = till.reserve(realm.use(realm.grant(holder), holder)).invocation
    name = derived_name("a/b", number)

    def derive(epoch: int) -> str:
        facts = sealed.public_facts(realm.seal(name, epoch=epoch, sign=till.enclave._signing))
        asked = DeriveRequest(number, name, facts.header, facts.directory)
        return str(realm.code(lambda: realm.ask("derive", realm.signed_by(till.enclave, asked), Registered)))

    assert [derive(epoch) for epoch in (1, 1, 2)] == ["", "rolled_back", "rolled_back"]
    assert len(realm.entries("derive")) == 1


@pytest.mark.threat("ENC-36")
def test_a_rule_for_a_derived_asset_takes_the_place_of_the_first_and_revives_nothing(
    realm: Any, till: Any, holder: SigningKey
) -> None:
    token, other = realm.grant(holder), realm.enclave("other", rank=5)
    number = till.reserve(realm.use(token, holder)).invocation
    name = derived_name("a/b", number)
    facts = sealed.public_facts(realm.seal(name, sign=till.enclave._signing))
    asked = DeriveRequest(number, name, facts.header, facts.directory)
    realm.ask("derive", realm.signed_by(till.enclave, asked), Registered)

    def codes() -> list[str]:
        return [realm.code(lambda one=one: one.unlock(facts)) for one in (till.enclave, other)]

    assert codes() == ["", "rule_denied"]
    realm.rule(name, readers=("other",))
    assert codes() == ["rule_denied", ""]
    realm.tell("revoke", Revoke(token.id))
    realm.rule(name, readers=("reader", "other"))
    assert codes() == ["revoked", "revoked"]
