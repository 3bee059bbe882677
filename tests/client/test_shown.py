"""How a handle shows itself: in tenths, with an age, without asking, and as text only."""

from __future__ import annotations

import time
from typing import Any

import pytest
from attrs import fields
from hypothesis import given
from hypothesis import strategies as st

from isolate.capability.scope import Choices, Range, Scope
from isolate.client import shown
from isolate.client.handle import Handle, attach
from isolate.client.held import Limits
from isolate.client.owner import Owner
from isolate.crypto.signing import SigningKey
from isolate.messages.invoke import Budget

DIGEST = b"d" * 32


def granted(owner: Owner, key: SigningKey, **limits: Any) -> Handle:
    file = owner.grant(
        "a/b", operations={"op": DIGEST}, holder=key.verifying_key.ed25519, enclave="unix:/enclave", job="acme/job",
        **limits,
    )  # fmt: skip
    return attach(file, signer=key)


def test_every_limit_is_shown(owner: Owner, key: SigningKey) -> None:
    handle = granted(
        owner, key,
        uses=100, bytes_out=4096, rates={60: 10}, lease=64, expires=1_800_000_000, not_before=1_700_000_000,
        minimum_group=12,
        parameters={"op": {"top": Range(1, 5), "what": Choices(["b", "a"])}}, outputs={"label": (10,)}, depth=2,
    )  # fmt: skip
    assert repr(handle) == (
        "<Handle on a/b: op; at most 100 uses; at most 4096 bytes out; 10 uses in 60 s; "
        "leases of at most 64 uses; outputs label(10); op.top 1..5; op.what a,b; groups of at least 12; "
        "from 2023-11-14 22:13 UTC; until 2027-01-15 08:00 UTC>"
    )
    html = handle._repr_html_()
    for row in ("<td>a/b</td>", "<td>2 times more</td>", "<td>not asked yet: handle.budget</td>"):
        assert row in html


def test_no_limit_is_left_out(owner: Owner, key: SigningKey) -> None:
    """Each alone, and each that a scope has: whoever adds one is told here to show it."""
    each: dict[str, Any] = {
        "parameters": {"op": {"top": Range(1, 5)}}, "outputs": {"label": (10,)}, "uses": 5, "bytes_out": 4096,
        "rates": {60: 10}, "minimum_group": 12, "not_before": 1, "expires": 1_800_000_000, "depth": 2, "lease": 64,
    }  # fmt: skip
    assert each.keys() | {"operations"} == {one.name for one in fields(Scope)}
    assert each.keys() == Limits.__annotations__.keys()  # what a type checker lets attenuate take
    opted = granted(owner, key, lease=99)
    for name, value in each.items():
        narrowed = opted.attenuate(**{name: value})  # type: ignore[misc]
        for limited in (granted(owner, key, **({"lease": 99} | {name: value})), narrowed):
            assert limited._repr_html_() != opted._repr_html_(), name
            # How often it may be passed on is no limit of a use: it stands in the table only.
            assert (repr(limited) != repr(opted)) is (name != "depth")


def test_a_lease_is_shown_where_there_is_one(owner: Owner, key: SigningKey) -> None:
    def narrowed(handle: Handle, lease: int) -> str:
        return repr(handle.attenuate(lease=lease))

    opted, plain = granted(owner, key, lease=64), granted(owner, key)
    assert "leases of at most 9 uses" in narrowed(opted, 9)
    # Two that forbid it, and one that a grant without a lease cannot be given by whoever narrows it.
    for said in (narrowed(opted, 0), repr(granted(owner, key, lease=1)), narrowed(plain, 9)):
        assert "lease" not in said


@pytest.mark.threat("HND-11")
def test_showing_a_handle_asks_nobody_and_a_budget_is_shown_in_tenths(
    owner: Owner, key: SigningKey, realm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = granted(owner, key, uses=100, bytes_out=4096)
    before = len(realm.carried)
    for _ in range(3):
        assert "left" not in repr(handle) + handle._repr_html_()
    assert len(realm.carried) == before
    assert handle.budget.uses == 100
    asked = len(realm.carried)
    assert "all of 100 uses left; all of 4096 bytes out left" in repr(handle)
    assert "budget as of just now>" in repr(handle)
    handle._remember(Budget(83, 2001))
    later = time.monotonic() + 185
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert "about 80 % of 100 uses left; about 50 % of 4096 bytes out left" in repr(handle)
    assert "budget as of 3 min ago>" in repr(handle) and "as of 3 min ago" in handle._repr_html_()
    assert not any(exact in repr(handle) + handle._repr_html_() for exact in ("83", "2001"))
    assert len(realm.carried) == asked


@given(st.integers(1, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_a_share_is_one_of_twelve_words(of: int, left: int) -> None:
    words = {"none", "all", "under 10 %", *(f"about {tenth}0 %" for tenth in range(1, 10))}
    assert shown.share(left, of) in words
    assert (shown.share(left, of) == "none") is (left == 0)


@pytest.mark.threat("HND-12")
def test_a_name_in_a_handle_is_no_markup_in_a_notebook(owner: Owner, key: SigningKey) -> None:
    asset = "<img src=x onerror=alert(1)>&\"'"
    handle = attach(
        owner.grant(
            asset, operations={"op": DIGEST}, holder=key.verifying_key.ed25519, enclave="unix:/e", job="j",
            parameters={"op": {"what": Choices(["<script>"])}},
        ),
        signer=key,
    )  # fmt: skip
    for html in (handle._repr_html_(), handle._repr_mimebundle_()["text/html"]):
        assert "<img" not in html and "<script" not in html and "&lt;img" in html


def test_odd_times_and_no_limits() -> None:
    assert shown.moment(2**63 - 1).endswith("(unix seconds)")
    said = dict(shown.limits(Scope(operations={}, outputs={}), None))
    assert said == {"uses": "any number of uses", "outputs": "outputs none"}
    assert shown.constraint_text(Choices([])) == "nothing"
    assert [shown.age(seconds) for seconds in (0, 60, 3600, 90_000)] == [
        "just now",
        "1 min ago",
        "1 h ago",
        "1 d ago",
    ]
