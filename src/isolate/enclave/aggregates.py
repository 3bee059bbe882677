"""Aggregates over groups of people: counts, means and sums, and nothing about a group that is too small.

    >>> import numpy as np
    >>> table = Aggregates(("a", "b", "c"), {"people": Count(), "age": Mean(0, 100, 100)}, minimum_group=3)
    >>> rows = Rows(entity=np.array([1, 1, 2, 3, 4]), group=np.array([0, 0, 0, 0, 1]),
    ...     values={"age": np.array([20.0, 40.0, 36.0, 36.0, 90.0])})
    >>> table.check(rows)  # three people in a; one in b, as good as none; none in c
    [[3, 34], None, None]
    >>> table.read(table.check(rows))
    {'a': {'people': 3, 'age': 34.0}}

An operation only selects rows. What is counted, clipped and rounded is done here, at the gate, so that no careless
operation gets round it:

1. every group stands in the declaration; a row of another group is refused;
2. an entity counts once in a group, whatever number of rows it has there: its mean for a mean, its total for a sum;
3. that contribution is clipped to the declared range, so that one entity moves a result by a known amount at most;
4. counts and sums are rounded to multiples of a declared step, means to a declared number of steps;
5. a group of fewer distinct entities than the minimum is None, and so is a group of nobody.

What is left: two answers whose selections differ by one person differ by that person (differencing); rounding hides
it only where it is coarser. Nothing here adds noise. Budgets bound how many answers there are.
Spec: docs/spec/operations.md, 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from attrs import evolve, field, frozen

from isolate.enclave.values import MAX_STEPS, MAX_VALUES, bits, refused
from isolate.errors import UsageError

MINIMUM_GROUP = 10  # distinct entities behind an aggregate, unless the operation says another number
MAX_ENTITIES = 2**32  # counted in one group: more is no table that fits an enclave
MAX_VALUE = 1e290  # of a row, so that no total of rows is infinite
MAX_BOUND = 2**31  # of a contribution, so that a sum of 2**32 of them is an integer of 64 bits


class Measure(Protocol):
    """What is said of each group. ``of`` takes each entity's contributions: their totals and their row counts."""

    def schema(self) -> list[Any]: ...
    def steps(self) -> int: ...
    def longest(self) -> int: ...
    def of(self, totals: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> int: ...
    def read(self, step: int) -> float: ...


@frozen
class Count:
    """Distinct entities, rounded to a multiple of ``step``. It needs no values."""

    step: int = 1

    def __attrs_post_init__(self) -> None:
        _check_step(self.step)

    def schema(self) -> list[Any]:
        return ["count", self.step]

    def steps(self) -> int:
        return MAX_ENTITIES // self.step + 1

    def longest(self) -> int:
        return self.steps() - 1

    def of(self, totals: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> int:
        return round(len(rows) / self.step)

    def read(self, step: int) -> float:
        return step * self.step


@frozen
class Mean:
    """The mean over entities, each with its own mean, clipped to ``low`` to ``high``; in ``count`` steps."""

    low: int
    high: int
    count: int

    def __attrs_post_init__(self) -> None:
        _check_range(self.low, self.high)
        if not 1 <= self.count <= MAX_STEPS:
            raise UsageError(f"a mean is quantised to 1 to {MAX_STEPS} steps")

    def schema(self) -> list[Any]:
        return ["mean", self.low, self.high, self.count]

    def steps(self) -> int:
        return self.count + 1

    def longest(self) -> int:
        return self.count

    def of(self, totals: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> int:
        # The mean of millions is off in its last digit: clipped again, so that it is no step beyond the last.
        mean = float(np.clip(np.clip(totals / rows, self.low, self.high).mean(), self.low, self.high))
        return round((mean - self.low) / (self.high - self.low) * self.count)

    def read(self, step: int) -> float:
        return self.low + (self.high - self.low) * step / self.count


@frozen
class Sum:
    """The sum over entities, each contributing its own total, clipped to ``low`` to ``high``; in multiples of
    ``step``."""

    low: int
    high: int
    step: int

    def __attrs_post_init__(self) -> None:
        _check_range(self.low, self.high)
        _check_step(self.step)

    def schema(self) -> list[Any]:
        return ["sum", self.low, self.high, self.step]

    def _ends(self) -> tuple[int, int]:
        return tuple(bound * MAX_ENTITIES // self.step for bound in (self.low, self.high))  # type: ignore[return-value]

    def steps(self) -> int:
        low, high = self._ends()
        return high - low + 1

    def longest(self) -> int:
        return max(self._ends(), key=abs)

    def of(self, totals: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> int:
        return round(float(np.clip(totals, self.low, self.high).sum()) / self.step)

    def read(self, step: int) -> float:
        return step * self.step


def _check_range(low: int, high: int) -> None:
    if not -MAX_BOUND <= low < high <= MAX_BOUND:
        raise UsageError(f"a contribution is clipped to a range within +-{MAX_BOUND}")


def _check_step(step: int) -> None:
    if not 1 <= step <= MAX_BOUND:
        raise UsageError(f"a count or sum is rounded to multiples of 1 to {MAX_BOUND}")


@frozen
class Rows:
    """What an operation selected: for each row its entity (integers), its group (a place in the declared list),
    and its values by the name of the measure. All of one length."""

    entity: np.ndarray[Any, Any] = field(repr=False)
    group: np.ndarray[Any, Any] = field(repr=False)
    values: Mapping[str, np.ndarray[Any, Any]] = field(factory=dict, repr=False)


@frozen
class Aggregates:
    """One row of ``measures`` for each of ``groups``, or None. ``minimum_group``: distinct entities, at least.

    An operation of this type answers Rows. A token, and the owner of any asset that it reads, may ask for a greater
    minimum; the greatest holds.
    """

    kind: ClassVar[str] = "vector"
    groups: tuple[str, ...]
    measures: Mapping[str, Measure]
    minimum_group: int = MINIMUM_GROUP

    def __attrs_post_init__(self) -> None:
        if not self.groups or len(set(self.groups)) != len(self.groups) or not self.measures:
            raise UsageError("aggregates have different groups and measures, at least one of each")
        if len(self.groups) * len(self.measures) > MAX_VALUES:
            raise UsageError(f"a table of aggregates has at most {MAX_VALUES} numbers")
        if self.minimum_group < 1:
            raise UsageError("a group has at least one entity")

    def schema(self) -> list[Any]:
        measures = {name: measure.schema() for name, measure in self.measures.items()}
        return ["aggregates", list(self.groups), measures, self.minimum_group]

    def sizes(self) -> tuple[int, ...]:
        """As a vector of one number a cell; None is one more value of a cell."""
        widest = max(measure.steps() for measure in self.measures.values())
        return (len(self.groups) * len(self.measures), bits(widest + 1))

    def at_least(self, minimum_group: int) -> Aggregates:
        """The same with this minimum, unless its own is greater."""
        return evolve(self, minimum_group=max(self.minimum_group, minimum_group))

    def check(self, value: Any) -> list[list[int] | None]:
        if not isinstance(value, Rows):
            raise refused()
        entity, group = _integers(value.entity), _integers(value.group)
        wanted = {name for name, measure in self.measures.items() if not isinstance(measure, Count)}
        values = {name: _numbers(column) for name, column in value.values.items()}
        lengths = {len(column) for column in (entity, group, *values.values())}
        if set(values) != wanted or len(lengths) != 1:
            raise refused()
        if len(group) and not 0 <= int(group.min()) <= int(group.max()) < len(self.groups):  # 1
            raise refused()
        return [self._row(group == number, entity, values) for number in range(len(self.groups))]

    def _row(
        self, chosen: np.ndarray[Any, Any], entity: np.ndarray[Any, Any], values: dict[str, np.ndarray[Any, Any]]
    ) -> list[int] | None:
        found, place = np.unique(entity[chosen], return_inverse=True)  # 2
        if len(found) < max(self.minimum_group, 1):  # 5
            return None
        rows = np.bincount(place, minlength=len(found))
        row = []
        for name, measure in self.measures.items():
            weights = values[name][chosen] if name in values else None
            # Only here: what is no number in a group that is not shown must not be told from nobody.
            if weights is not None and np.isnan(weights).any():
                raise refused()
            totals = rows if weights is None else np.bincount(place, weights=weights, minlength=len(found))
            row.append(measure.of(totals, rows))  # 3, 4
        return row

    def longest(self) -> list[list[int]]:
        return [[measure.longest() for measure in self.measures.values()]] * len(self.groups)

    def read(self, value: list[list[int] | None]) -> dict[str, dict[str, float]]:
        """The groups of which something was said, by name."""
        said = [(group, row) for group, row in zip(self.groups, value, strict=True) if row is not None]
        measures = self.measures.items()
        return {
            group: {name: measure.read(step) for (name, measure), step in zip(measures, row, strict=True)}
            for group, row in said
        }


def _integers(column: Any) -> np.ndarray[Any, Any]:
    if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype.kind not in "iu":
        raise refused()
    return column


def _numbers(column: Any) -> np.ndarray[Any, Any]:
    if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype.kind not in "iuf":
        raise refused()
    numbers = column.astype(np.float64)
    return np.where(np.isfinite(numbers), np.clip(numbers, -MAX_VALUE, MAX_VALUE), np.nan)
