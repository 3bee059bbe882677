"""Aggregates: what a group that is too small looks like, and how much one person moves a result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolate.enclave.operations import Aggregates, Count, Integer, Mean, Rows, Sum, operation
from isolate.enclave.replies import fit, size_of
from isolate.errors import OutputRefused, UsageError

GROUPS = ("a", "b", "c")


def table(minimum: int = 3, **measures: Any) -> Aggregates:
    return Aggregates(GROUPS, measures or {"people": Count(), "age": Mean(0, 100, 1000)}, minimum)


def rows(*people: tuple[int, int, float], measure: str = "age") -> Rows:
    """Each an entity, a group and a value."""
    entity, group, value = zip(*people, strict=True) if people else ((), (), ())
    return Rows(np.array(entity, int), np.array(group, int), {measure: np.array(value, float)})


FOUR = tuple((number, 0, 50.0) for number in range(4))


@pytest.mark.threat("AGG-1")
@pytest.mark.parametrize("few", [1, 2])
def test_a_group_below_the_minimum_is_as_absent_as_an_empty_one(few: int) -> None:
    """Byte for byte: which of the two it is, no answer says."""
    small = tuple((100 + number, 1, 33.0) for number in range(few))
    absent, present = (table().check(rows(*FOUR, *more)) for more in ((), small))
    assert absent == present == [[4, 500], None, None]
    size = size_of(table())
    assert fit("", absent, "00" * 8, size) == fit("", present, "00" * 8, size)
    full = table().check(rows(*FOUR, *small, *((200 + number, 1, 33.0) for number in range(3))))
    assert full[1] == [3 + few, 330]
    assert len(fit("", full, "00" * 8, size)) == size


@pytest.mark.threat("AGG-1")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308])
def test_a_value_that_is_no_number_does_not_tell_a_small_group_from_an_empty_one(value: float) -> None:
    measures = {"people": Count(), "age": Mean(0, 100, 1000)}
    absent, present = (table(**measures).check(rows(*FOUR, *more)) for more in ((), ((100, 1, value),)))
    assert absent == present == [[4, 500], None, None]


@pytest.mark.threat("AGG-2")
def test_one_person_with_many_rows_is_one_person() -> None:
    many = tuple((7, 1, 90.0) for _ in range(50))
    assert table().check(rows(*FOUR, *many)) == [[4, 500], None, None]
    others = ((8, 1, 10.0), (9, 1, 20.0))
    assert table().check(rows(*many, *others))[1] == [3, 400]  # (90 + 10 + 20) / 3, not the mean of the rows


@pytest.mark.threat("AGG-3")
def test_one_person_moves_a_result_by_no_more_than_the_declared_range() -> None:
    rich = (99, 0, 10.0**300)
    assert table().check(rows(*FOUR, rich))[0] == [5, 600]  # as if it were 100
    assert table().check(rows(*FOUR, (99, 0, -(10.0**300))))[0] == [5, 400]
    total = table(total=Sum(0, 100, 10))
    assert total.check(rows(*FOUR, rich, measure="total"))[0] == [30]
    assert total.check(rows(*FOUR, rich, rich, measure="total"))[0] == [30]


def test_counts_and_sums_are_rounded_to_their_step() -> None:
    many = tuple((number, 0, 1.0) for number in range(13))
    rounded = table(people=Count(5), total=Sum(-10, 10, 5))
    assert rounded.check(rows(*many, measure="total")) == [[3, 3], None, None]
    assert rounded.read([[3, 3], None, None]) == {"a": {"people": 15, "total": 15}}


@pytest.mark.threat("AGG-4")
def test_the_greatest_minimum_holds() -> None:
    assert [table(3).at_least(least).minimum_group for least in (0, 2, 3, 5)] == [3, 3, 3, 5]
    assert table(3).at_least(5).check(rows(*FOUR)) == [None, None, None]
    assert Aggregates(GROUPS, {"people": Count()}).minimum_group == 10

    @operation(inputs={"n": Integer(0, 1)}, output=table(3))
    def ages(view: Any, n: int) -> Any:
        return rows(*FOUR)

    limited = ages.under(5)
    assert (ages.run({}, {"n": 1})[0], limited.run({}, {"n": 1})[0]) == ([4, 500], None)  # type: ignore[arg-type]
    assert (limited.digest, limited.reply_size) == (ages.digest, ages.reply_size)
    assert limited.under(2).output.minimum_group == 5  # type: ignore[attr-defined]


@pytest.mark.threat("AGG-5")
@pytest.mark.parametrize(
    "odd",
    [
        None, {"a": 1}, [[1, 2]], rows((1, 3, 1.0)), rows((1, -1, 1.0)), rows(*FOUR, (1, 0, float("nan"))),
        rows(*FOUR, (9, 0, float("inf"))), rows(*FOUR, measure="income"),
        Rows(np.zeros(2, int), np.zeros(3, int), {}),
        Rows(np.zeros(2), np.zeros(2, int), {"age": np.zeros(2)}), Rows([1], [0], {"age": [1.0]}),  # type: ignore[arg-type]
        Rows(np.zeros(2, int), np.zeros(2, int), {"age": np.array(["x", "y"])}),
        Rows(np.zeros((2, 1), int), np.zeros(2, int), {"age": np.zeros(2)}),
    ],
)  # fmt: skip
def test_what_is_no_selection_of_rows_is_refused(odd: Any) -> None:
    """An operation cannot hand the gate finished numbers: it only selects."""
    with pytest.raises(OutputRefused):
        table().check(odd)


@pytest.mark.threat("AGG-5")
@pytest.mark.parametrize("bad", ["entity", "group", "age"])
@pytest.mark.parametrize(
    "odd", [[0] * 4, np.zeros(3), np.zeros((4, 1)), np.zeros(5, int), np.array(["0"] * 4), None]
)
def test_a_selection_with_one_column_that_is_none(bad: str, odd: Any) -> None:
    columns: dict[str, Any] = {"entity": np.arange(4), "group": np.zeros(4, int), "age": np.ones(4)}
    assert table().check(Rows(columns["entity"], columns["group"], {"age": columns["age"]}))[0] is not None
    columns[bad] = odd
    with pytest.raises(OutputRefused):
        table().check(Rows(columns["entity"], columns["group"], {"age": columns["age"]}))


def test_sizes_and_the_longest_follow_from_the_declaration() -> None:
    """What a scope's ``outputs`` limits (docs/spec/operations.md, 5): one number a cell, and null."""
    low, high, count, mean = Sum(-9, 5, 3), Sum(-5, 9, 3), Count(2), Mean(0, 9, 62)
    assert (low.longest(), high.longest()) == (-9 * 2**32 // 3, 9 * 2**32 // 3)
    assert (count.longest(), mean.longest()) == (2**31, 62)
    assert [measure.steps() for measure in (low, count, mean)] == [3 * 2**32 + 5 * 2**32 // 3 + 1, 2**31 + 1, 63]
    assert table(mean=mean).sizes() == (3, 6)
    assert table(mean=Mean(0, 9, 63)).sizes() == (3, 7)
    assert table(mean=mean, low=low, count=count).sizes() == (9, 35)
    assert size_of(table(low=low)) == size_of(table(high=high)) == 256


def test_the_widest_declarations_are_taken() -> None:
    wide = 2**31
    total, mean = Sum(-wide, wide, wide), Mean(-wide, wide, 2**53)
    assert mean.of(np.array([1e300]), np.array([1])) == 2**53
    assert total.of(np.array([-1e300]), np.array([1])) == -1
    assert Mean(0, 1, 1).of(np.array([1.0]), np.array([1])) == 1
    assert Count(wide).read(1) == wide
    assert len(Aggregates(tuple(map(str, range(65536))), {"people": Count()}).groups) == 65536
    for attempt in (
        lambda: Sum(-wide - 1, 0, 1), lambda: Sum(0, wide + 1, 1), lambda: Count(wide + 1),
        lambda: Mean(0, 1, 2**53 + 1),
        lambda: Aggregates(tuple(map(str, range(32769))), {"a": Count(), "b": Count()}),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            attempt()


def test_a_rows_repr_shows_none_of_them() -> None:
    assert repr(rows((123456, 0, 1.0))) == "Rows()"


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.floats(-1e308, 1e308)), max_size=40),
    st.integers(1, 6),
)
def test_whatever_the_rows_no_small_group_shows(people: list[tuple[int, int, float]], minimum: int) -> None:
    declared = table(minimum, people=Count(), age=Mean(-5, 5, 10))
    found = declared.check(rows(*people))
    for group in range(3):
        size = len({entity for entity, where, _ in people if where == group})
        row = found[group]
        assert (row is None) is (size < minimum)
        if row is not None:
            assert row[0] == size
            assert 0 <= row[1] <= 10


def test_declarations_that_are_none() -> None:
    for attempt in (
        lambda: Aggregates((), {"n": Count()}), lambda: Aggregates(("a", "a"), {"n": Count()}),
        lambda: Aggregates(("a",), {}), lambda: Aggregates(("a",), {"n": Count()}, 0), lambda: Count(0),
        lambda: Mean(1, 1, 10), lambda: Mean(0, 1, 0), lambda: Sum(0, 2**40, 1), lambda: Sum(0, 1, 0),
        lambda: Aggregates(tuple(map(str, range(70000))), {"n": Count()}),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            attempt()
