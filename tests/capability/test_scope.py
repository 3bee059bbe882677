"""The lattice of scopes: its laws, what it decides, and what it refuses to read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolate.capability import Choices, Range, Scope, meet
from isolate.capability.scope import OUTPUT_KINDS
from isolate.crypto import cbor
from isolate.errors import CapabilityRefused, ScopeExceeded, UsageError

DIGEST = bytes(32)


@pytest.mark.threat("CAP-1")
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_meet_is_total_associative_commutative_idempotent_and_monotone(scopes: Any, data: st.DataObject) -> None:
    a, b, c = (data.draw(scopes) for _ in range(3))
    both = meet(a, b)
    assert both == meet(b, a)
    assert meet(a, a) == a
    assert meet(meet(a, b), c) == meet(a, meet(b, c))
    assert meet(a, Scope()) == a
    assert both.is_within(a) and both.is_within(b)
    # Monotone: what is within a stays within it, met with anything.
    assert meet(both, c).is_within(meet(a, c))


def permitted(scope: Scope) -> set[tuple[object, ...]]:
    """Everything that a scope allows, of a small world: a second way to say what a meet is."""
    allowed: set[tuple[object, ...]] = set()

    def ask(what: tuple[object, ...], question: Any, *arguments: Any) -> None:
        try:
            question(*arguments)
        except CapabilityRefused:
            return
        allowed.add(what)

    for name in ("classify", "score", "search"):
        for number in range(3):
            if scope.operations is not None:
                ask(("run", name, number), scope.check_operation, name, bytes([number]) * 32)
            else:
                allowed.add(("run", name, number))
        for parameter in ("k", "top"):
            for value in (*range(-4, 5), "a", "b", ""):
                limit = (scope.parameters or {}).get(name, {}).get(parameter)
                if limit is None or limit.permits(value):
                    allowed.add(("argument", name, parameter, value))
    for size in range(10):
        ask(("label", size), scope.check_output, "label", size)
        for bits in range(10):
            ask(("vector", size, bits), scope.check_output, "vector", size, bits)
    ask(("handle",), scope.check_output, "handle")
    for now in range(5):
        ask(("time", now), scope.check_time, now)
    for name in ("uses", "bytes_out", "depth", "lease"):
        limit = getattr(scope, name)
        allowed |= {(name, number) for number in range(5) if limit is None or number <= limit}
    allowed |= {("group", number) for number in range(5) if number >= (scope.minimum_group or 0)}
    rates = scope.rates or {}
    allowed |= {("rate", s, n) for s in range(1, 5) for n in range(10) if s not in rates or n <= rates[s]}
    return allowed


@pytest.mark.threat("CAP-1")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_meet_allows_exactly_what_both_allow(scopes: Any, data: st.DataObject) -> None:
    a, b = data.draw(scopes), data.draw(scopes)
    assert permitted(meet(a, b)) == permitted(a) & permitted(b)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_scope_survives_its_encoding(scopes: Any, data: st.DataObject) -> None:
    scope = data.draw(scopes)
    assert Scope.parse(scope.encode()) == scope
    assert Scope.parse(scope.encode()).encode() == scope.encode()


def test_absent_inherits_and_empty_forbids() -> None:
    parent = Scope(operations={"classify": DIGEST}, outputs={"label": (10,)})
    assert meet(parent, Scope(uses=1)).operations == {"classify": DIGEST}
    nothing = meet(parent, Scope(operations={}, outputs={}))
    with pytest.raises(ScopeExceeded):
        nothing.check_operation("classify", DIGEST)
    with pytest.raises(ScopeExceeded):
        nothing.check_output("label", 0)


def test_an_operation_of_the_same_name_in_another_version_is_another() -> None:
    scope = meet(Scope(operations={"classify": DIGEST}), Scope(operations={"classify": bytes([1]) * 32}))
    assert scope.operations == {}


def test_a_scope_without_operations_allows_none() -> None:
    with pytest.raises(ScopeExceeded):
        Scope().check_operation("classify", DIGEST)


@pytest.mark.parametrize(
    "arguments", [{}, {"top": 0}, {"top": 11}, {"top": True}, {"top": 5.0}, {"top": "5"}, {"top": None}]
)
def test_a_limited_argument_must_be_there_and_within(arguments: dict[str, object]) -> None:
    scope = Scope(parameters={"score": {"top": Range(1, 10)}})
    with pytest.raises(ScopeExceeded, match="argument top of score"):
        scope.check_arguments("score", arguments)
    scope.check_arguments("classify", arguments)
    scope.check_arguments("score", {"top": 10, "other": object()})
    Scope().check_arguments("score", arguments)


def test_choices_take_values_of_the_same_type_only() -> None:
    choices = Choices([1, "a"])
    assert choices.permits(1) and choices.permits("a")
    assert not any(choices.permits(value) for value in (True, 1.0, "1", b"a", [1], None))
    assert not Choices([]).permits(0)


def test_times_are_half_open() -> None:
    scope = Scope(not_before=10, expires=20)
    scope.check_time(10)
    scope.check_time(19)
    for now, code in ((9, "not_yet_valid"), (20, "expired")):
        with pytest.raises(CapabilityRefused) as caught:
            scope.check_time(now)
        assert caught.value.code == code


def test_every_kind_of_output_has_its_sizes() -> None:
    for kind, sizes in OUTPUT_KINDS.items():
        scope = Scope(outputs={kind: tuple(5 for _ in sizes)})
        scope.check_output(kind, *(5 for _ in sizes))
        Scope().check_output(kind, *(10**9 for _ in sizes))
        for position in range(len(sizes)):
            with pytest.raises(ScopeExceeded):
                scope.check_output(kind, *(5 + (number == position) for number in range(len(sizes))))
        with pytest.raises(UsageError):
            scope.check_output(kind, *range(len(sizes) + 1))
    with pytest.raises(ScopeExceeded):
        Scope(outputs={"label": (5,)}).check_output("text", 1)
    with pytest.raises(UsageError):
        Scope().check_output("logits", 10)


BAD_VALUES: list[dict[str, Any]] = [
    {"operations": {"Classify": DIGEST}},
    {"operations": {"classify": bytes(31)}},
    {"operations": {"classify": "x" * 32}},
    {"operations": [DIGEST]},
    {"operations": {1: DIGEST}},
    {"operations": {"classify": DIGEST + b"x"}},
    {"operations": {"c" * 65: DIGEST}},
    {"operations": {"classify\n": DIGEST}},
    {"uses": -1},
    {"uses": 2**63},
    {"uses": True},
    {"uses": None},
    {"bytes_out": "many"},
    {"expires": b"\x00"},
    {"depth": [1]},
    {"rates": {0: 1}},
    {"rates": {60: -1}},
    {"rates": {"60": 1}},
    {"outputs": {"logits": [1]}},
    {"outputs": {"label": []}},
    {"outputs": {"label": [-1]}},
    {"outputs": {"vector": [1]}},
    {"outputs": {"label": 1}},
    {"outputs": {"label": [2**63]}},
    {"outputs": {1: []}},
    {"outputs": {"handle": [0]}},
    {"rates": {60: 2**63}},
    {"rates": {-1: 1}},
    {"rates": []},
    {"parameters": {"score": {"top": [2, 1]}}},
    {"parameters": {"score": {"top": [1, 1]}}},
    {"parameters": {"score": {"top": [True]}}},
    {"parameters": {"score": {"top": [[1]]}}},
    {"parameters": {"score": {"top": [2**63]}}},
    {"parameters": {"score": {"top": [-(2**63)]}}},
    {"parameters": {"score": {"top": [b"x"]}}},
    {"parameters": {"score": {"top": 1}}},
    {"parameters": {"score": {"top": "ab"}}},
    {"parameters": {"score": {"top": {"least": 0, "most": 2**63}}}},
    {"parameters": {"score": {"top": {"least": -(2**63), "most": 0}}}},
    {"parameters": {"score": {"top": {"least": 0, "most": True}}}},
    {"parameters": {"score": {"top": {"least": 2, "most": 1}}}},
    {"parameters": {"score": {"top": {"least": 1}}}},
    {"parameters": {"score": {"top": {"least": 1, "most": 2, "step": 1}}}},
    {"parameters": {"score": {"top": {"least": "a", "most": "b"}}}},
    {"parameters": {"score": {"9top": [1]}}},
    {"parameters": {"score": {"t" * 65: [1]}}},
    {"parameters": {"score": {1: [1]}}},
    {"parameters": {1: {}}},
    {"parameters": []},
    {"parameters": {"score": 1}},
    {"parameters": {"Score": {}}},
    {"loan": 10},
    {"lease": -1},
    {"uses ": 10},
    {1: 2},
]


@pytest.mark.threat("CAP-2")
@pytest.mark.parametrize("value", BAD_VALUES, ids=repr)
def test_what_is_unknown_or_malformed_is_refused_when_read(value: dict[str, Any]) -> None:
    with pytest.raises(CapabilityRefused):
        Scope.parse(cbor.encode(value))


def test_the_greatest_and_least_of_everything_is_read() -> None:
    value = {
        "operations": {"c" * 64: DIGEST, "a": DIGEST},
        "parameters": {
            "a": {"P" * 64: {"least": -(2**63) + 1, "most": 2**63 - 1}, "_": [2**63 - 1, -(2**63) + 1, ""]}
        },
        "outputs": {"handle": [], "vector": [0, 2**63 - 1]},
        "rates": {1: 0, 2**63 - 1: 2**63 - 1},
        **dict.fromkeys(
            ("uses", "bytes_out", "minimum_group", "not_before", "expires", "depth", "lease"), 2**63 - 1
        ),
    }
    assert Scope.parse(cbor.encode(value)).to_value() == value


@pytest.mark.threat("CAP-1")
def test_what_is_left_where_two_blocks_limit_one_parameter() -> None:
    def left(one: Any, other: Any) -> Any:
        both = meet(Scope(parameters={"score": {"top": one}}), Scope(parameters={"score": {"top": other}}))
        assert both == meet(Scope(parameters={"score": {"top": other}}), Scope(parameters={"score": {"top": one}}))
        return (both.parameters or {})["score"]["top"]

    assert left(Range(1, 5), Range(3, 9)) == Range(3, 5)
    assert left(Range(1, 5), Range(5, 9)) == Range(5, 5)
    assert left(Range(1, 4), Range(5, 9)) == Choices([])
    assert left(Range(1, 4), Choices([0, 1, 4, 5, "a"])) == Choices([1, 4])
    assert left(Choices([1, 2, "a"]), Choices([2, "a", "b"])) == Choices([2, "a"])


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x00", b"\xa1", bytes(5000), cbor.encode({}) + b"\x00"])
def test_what_is_no_scope_is_refused(data: bytes) -> None:
    with pytest.raises(CapabilityRefused):
        Scope.parse(data)


@pytest.mark.parametrize(
    "arguments",
    [{"uses": -1}, {"uses": 1.5}, {"operations": 1}, {"rates": {1.5: 1}}, {"parameters": {"a": {"b": 3}}}],
    ids=repr,
)
def test_misuse_is_a_usage_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Scope(**arguments)


@pytest.mark.parametrize("value", [True, 1.0, b"a", None, [1], 2**63, -(2**63)], ids=repr)
def test_choices_of_something_else_are_a_usage_error(value: Any) -> None:
    with pytest.raises(UsageError):
        Choices([value])


def test_a_scope_cannot_be_changed_through_what_it_was_made_of() -> None:
    operations = {"classify": DIGEST}
    scope = Scope(operations=operations)
    operations["score"] = DIGEST
    assert scope.operations == {"classify": DIGEST}
    with pytest.raises(TypeError):
        scope.operations["score"] = DIGEST  # type: ignore[index]


@pytest.mark.parametrize(
    ("least", "most"), [(2, 1), ("a", "b"), (True, 2), (0, True), (0, 1.5), (0, 2**63), (-(2**63), 0), (0.0, 1.0)]
)
def test_a_range_is_of_integers_in_order(least: Any, most: Any) -> None:
    with pytest.raises(UsageError):
        Range(least, most)


@pytest.mark.threat("CAP-13")
def test_a_limit_that_nobody_enforces_is_refused() -> None:
    known = {"operations", "parameters", "uses", "bytes_out", "not_before", "expires", "depth"}
    Scope(operations={}, uses=1, depth=0).require_enforced(known)
    for limit in ({"rates": {60: 1}}, {"minimum_group": 0}, {"outputs": {}}):
        with pytest.raises(CapabilityRefused) as caught:
            Scope(operations={}, **limit).require_enforced(known)
        assert caught.value.code == "not_enforced"
