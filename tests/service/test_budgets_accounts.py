"""Accounts of holders and assets, rates, and what they stop: Sybils, many handles, clocks that are set back."""

from __future__ import annotations

from typing import Any

import pytest

from isolate.capability.scope import Scope
from isolate.capability.token import Token
from isolate.crypto.signing import SigningKey
from isolate.errors import MalformedError
from isolate.messages.invoke import Budget
from isolate.messages.limits import MAX_LIMIT, AssetLimits


def limit(realm: Any, **limits: int) -> None:
    fields: dict[str, Any] = dict.fromkeys(("uses", "bytes_out", "holder_uses", "holder_bytes"))
    realm.tell("limits", AssetLimits("a/b", **(fields | limits)))


def passed_on(token: Token, holder: SigningKey, **limits: Any) -> tuple[Token, SigningKey]:
    """To a key that nobody has seen before."""
    other = SigningKey.generate()
    return token.attenuate(holder, Scope(**limits), other.verifying_key.ed25519), other


@pytest.mark.threat("BUD-6")
def test_sybil_delegation_against_the_asset_cap(realm: Any, till: Any, holder: SigningKey) -> None:
    """A holder makes keys and handles as it likes: together they get what the asset gives, and no more."""
    limit(realm, uses=5)
    token = realm.grant(holder, uses=1000)
    codes = [till.use(*passed_on(token, holder)) for _ in range(8)]
    assert codes == [""] * 5 + ["budget_exhausted"] * 3
    # Another grant, of another holder, is on the same asset.
    stranger = SigningKey.generate()
    assert till.use(realm.grant(stranger), stranger) == "budget_exhausted"
    assert till.left(token, holder) == Budget(0, None)


@pytest.mark.threat("BUD-6")
def test_sybil_delegation_against_the_cap_of_a_holder(realm: Any, till: Any, holder: SigningKey) -> None:
    limit(realm, holder_uses=3, holder_bytes=10_000)
    token, again = realm.grant(holder), realm.grant(holder)
    # Through two grants, a narrowed handle, and keys of its own that it passed it on to.
    assert [till.use(token, holder), till.use(again, holder)] == ["", ""]
    child, other = passed_on(token, holder)
    assert till.use(child, other) == ""
    for one, key in ((token, holder), (again, holder), (child, other), passed_on(token, holder)):
        assert till.use(one, key) == "budget_exhausted"
    # Who was given a handle by somebody else has a cap of its own.
    stranger = SigningKey.generate()
    assert till.use(realm.grant(stranger), stranger) == ""


@pytest.mark.threat("BUD-6")
def test_who_is_given_handles_by_several_has_one_cap(realm: Any, till: Any, holder: SigningKey) -> None:
    limit(realm, holder_uses=3)
    other, friend = SigningKey.generate(), SigningKey.generate()
    given = [
        realm.grant(one).attenuate(one, Scope(), friend.verifying_key.ed25519) for one in (holder, other, holder)
    ]
    assert [till.use(one, friend) for one in (*given, given[0])] == ["", "", "", "budget_exhausted"]
    # Of three handles one was the other's: he has two uses left, and the first one has spent two.
    assert [till.left(realm.grant(one), one).uses for one in (holder, other)] == [1, 2]
    # Who stands twice in a chain is charged once.
    there, third = passed_on(realm.grant(other), other)
    back = there.attenuate(third, Scope(), other.verifying_key.ed25519)
    again = back.attenuate(other, Scope(), third.verifying_key.ed25519)
    assert till.use(again, third) == ""
    assert [till.left(realm.grant(one), one).uses for one in (other, third)] == [1, 2]


def test_each_asset_has_accounts_of_its_own(realm: Any, till: Any, holder: SigningKey) -> None:
    realm.asset("c/d")
    limit(realm, uses=2, holder_uses=2)
    realm.tell("limits", AssetLimits("c/d", 1, None, 1, None))
    one, other = realm.grant(holder), realm.grant(holder, asset="c/d")
    assert [till.use(one, holder), till.use(other, holder), till.use(one, holder)] == ["", "", ""]
    assert [till.use(token, holder) for token in (one, other)] == ["budget_exhausted"] * 2


@pytest.mark.threat("BUD-6")
def test_bytes_of_holder_and_asset_are_capped_too(realm: Any, till: Any, holder: SigningKey) -> None:
    limit(realm, bytes_out=1000, holder_bytes=600)
    token, stranger = realm.grant(holder), SigningKey.generate()
    assert till.left(token, holder) == Budget(None, 600)
    assert [till.use(token, holder) for _ in range(3)] == ["", "", "budget_exhausted"]
    other = realm.grant(stranger)
    assert [till.use(other, stranger) for _ in range(2)] == ["", "budget_exhausted"]
    # What was not needed comes back to all of them.
    number = till.reserve(realm.use(other, stranger, bytes_out=232)).invocation
    till.settle(number, 0)
    assert till.left(other, stranger) == Budget(None, 232)


@pytest.mark.threat("BUD-6")
def test_the_owner_alone_sets_limits_and_what_was_used_counts(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder)
    assert [till.use(token, holder) for _ in range(3)] == [""] * 3
    limit(realm, uses=2)
    assert till.use(token, holder) == "budget_exhausted"
    limit(realm, uses=4)
    assert [till.use(token, holder) for _ in range(2)] == ["", "budget_exhausted"]
    wish = realm.owner_request(AssetLimits("a/b", None, None, None, None), key=holder)
    assert realm.code(lambda: realm.ask("owner/limits", wish, Budget)) == "not_owner"
    assert [one["uses"] for one in realm.entries("limits")] == [2, 4]
    realm.reopen()
    assert till.use(token, holder) == "budget_exhausted"


@pytest.mark.parametrize("value", [-1, MAX_LIMIT + 1])
def test_what_is_no_limit(value: int) -> None:
    with pytest.raises(MalformedError):
        AssetLimits("a/b", None, value, None, None)
    for name in ("", "x" * 129, "a\nb"):
        with pytest.raises(MalformedError):
            AssetLimits(name, None, None, None, None)


@pytest.mark.threat("BUD-7")
def test_a_rate_holds_in_every_window(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, rates={10: 2, 40: 3})
    used: list[int] = []
    for _ in range(120):
        if till.use(token, holder) == "":
            used.append(realm.clock.now)
        realm.clock.now += 1
    assert len(used) >= 7  # it is no stop
    for begin in range(used[0] - 40, used[-1] + 1):
        assert sum(begin <= one < begin + 10 for one in used) <= 2
        assert sum(begin <= one < begin + 40 for one in used) <= 3


@pytest.mark.threat("BUD-7")
def test_a_rate_is_of_the_handle_its_ancestors_and_its_holder(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, rates={60: 4})
    child, other = passed_on(token, holder, rates={60: 2})
    assert [till.use(child, other) for _ in range(3)] == ["", "", "rate_exceeded"]
    # The parent's window has the child's uses in it.
    assert [till.use(token, holder) for _ in range(3)] == ["", "", "rate_exceeded"]
    # A second grant at the same rate gives the same holder nothing more; nor does a key of its own.
    again = realm.grant(holder, rates={60: 4})
    assert till.use(again, holder) == "rate_exceeded"
    assert till.use(*passed_on(again, holder)) == "rate_exceeded"
    # What a holder narrows for itself binds that handle, and not its others.
    own = SigningKey.generate()
    wide = realm.grant(own, rates={60: 4})
    narrow = wide.attenuate(own, Scope(rates={60: 1}))
    assert [till.use(one, own) for one in (wide, narrow, narrow, wide)] == ["", "", "rate_exceeded", ""]
    realm.clock.now += 60
    assert till.use(child, other) == ""


@pytest.mark.threat("BUD-7")
def test_a_rate_also_counts_uses_through_handles_without_one(realm: Any, till: Any, holder: SigningKey) -> None:
    free, paced = realm.grant(holder), realm.grant(holder, rates={60: 2})
    assert [till.use(free, holder) for _ in range(3)] == [""] * 3
    assert till.use(paced, holder) == "rate_exceeded"
    assert till.use(free, holder) == ""
    # And they leave the window as they came into it.
    realm.clock.now += 60
    assert [till.use(paced, holder) for _ in range(3)] == ["", "", "rate_exceeded"]


@pytest.mark.threat("BUD-8")
def test_a_clock_that_is_set_back_frees_nothing(realm: Any, till: Any, holder: SigningKey) -> None:
    paced = realm.grant(holder, rates={60: 2}, uses=3)
    brief = realm.grant(holder, expires=realm.clock() + 100)
    assert [till.use(paced, holder) for _ in range(3)] == ["", "", "rate_exceeded"]
    for back in (1, 59, 60, 61, 10_000):
        realm.clock.now -= back
        assert till.use(paced, holder) == "rate_exceeded"
        realm.clock.now += back
    realm.clock.now += 100
    assert till.use(brief, holder) == "expired"
    assert till.use(paced, holder) == ""
    realm.clock.now -= 50
    realm.reopen()  # which takes the time of its log
    assert till.use(brief, holder) in ("expired", "result_expired")
    realm.clock.now += 50
    assert [till.use(brief, holder), till.use(paced, holder)] == ["expired", "budget_exhausted"]


@pytest.mark.threat("SVC-6")
def test_a_refused_rate_leaves_no_trace_in_the_accounts(realm: Any, till: Any, holder: SigningKey) -> None:
    token = realm.grant(holder, rates={60: 1}, uses=5, bytes_out=5000)
    assert till.use(token, holder) == ""
    rows = {name: realm.rows()[name] for name in ("account", "pace", "reservation")}
    assert [till.use(token, holder) for _ in range(4)] == ["rate_exceeded"] * 4
    assert {name: realm.rows()[name] for name in rows} == rows
    assert till.left(token, holder) == Budget(4, 4744)
