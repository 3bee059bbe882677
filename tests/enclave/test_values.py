"""The closed types: which few forms go in and come out, and in how many bytes."""

from __future__ import annotations

import enum
import math
from typing import Any

import numpy as np
import pytest

from isolate.capability.scope import OUTPUT_KINDS
from isolate.enclave.operations import Aggregates as Table
from isolate.enclave.operations import (
    Array,
    Choice,
    Count,
    Derived,
    Integer,
    Joined,
    Label,
    Mean,
    Scalar,
    Sum,
    Text,
    Vector,
)
from isolate.enclave.replies import MAX_CODE, fit, size_of
from isolate.enclave.values import bits
from isolate.errors import CapabilityRefused, OutputRefused, UsageError
from isolate.messages.invoke import Reply

OUTPUTS: list[Any] = [
    Label(10), Label(2**40), Choice(("yes", "no")), Scalar(0, 1, 100), Scalar(-1, 1, 2**53), Vector(300, 0, 1, 255),
    Text(1), Text(1000), Derived(), Table(("a", "b"), {"n": Count(), "m": Mean(0, 9, 90), "s": Sum(-9, 9, 1)}),
]  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS, ids=repr)
def test_a_type_is_of_a_kind_that_scopes_limit(output: Any) -> None:
    assert len(output.sizes()) == len(OUTPUT_KINDS[output.kind])
    assert all(type(size) is int and size >= 0 for size in output.sizes())


def test_schemas_are_those_of_the_specification() -> None:
    """docs/spec/operations.md, 2 and 5: they are in the digest that a grant names."""
    table = Table(("a", "b"), {"n": Count(5), "m": Mean(0, 9, 90), "s": Sum(-9, 9, 2)}, 7)
    measures = {"n": ["count", 5], "m": ["mean", 0, 9, 90], "s": ["sum", -9, 9, 2]}
    for kind, schema in (
        (Array("uint8", (2, 3)), ["array", "uint8", [2, 3]]), (Integer(-1, 9), ["integer", -1, 9]),
        (Choice(("b", "a")), ["choice", ["b", "a"]]), (Label(10), ["label", 10]),
        (Scalar(0, 1, 20), ["scalar", 0, 1, 20]), (Vector(3, 0, 1, 9), ["vector", 3, 0, 1, 9]),
        (Text(24), ["text", 24]), (table, ["aggregates", ["a", "b"], measures, 7]), (Derived(), ["derived"]),
        (Joined("c/d"), ["joined", "c/d"]),
    ):  # fmt: skip
        assert kind.schema() == schema  # type: ignore[attr-defined]


@pytest.mark.parametrize("output", OUTPUTS, ids=repr)
def test_the_longest_value_passes_and_fits(output: Any) -> None:
    if not isinstance(output, Derived | Table):
        longest = output.longest()
        assert output.check(output.read(longest) if hasattr(output, "read") else longest) == longest
    size = size_of(output)
    assert len(fit("", output.longest(), "0" * 16, size)) == size


@pytest.mark.threat("ENC-3")
@pytest.mark.parametrize("size", [256, 512, 768, 66048])
def test_a_reply_has_one_length_whatever_is_in_it(size: int) -> None:
    """Also those lengths that the head of the padding would jump over."""
    longest = size - len(Reply("", "", "ab" * 8).encode())  # of a text, less the head of its own length
    longest -= 1 if longest < 257 else 2 if longest < 65538 else 4
    for length in (*range(min(longest, 99)), *range(max(longest - 299, 99), longest + 1)):
        reply = fit("", "x" * length, "ab" * 8, size)
        assert len(reply) == size
        read = Reply.parse(reply)
        assert read.value == "x" * length and not any(read.padding)
        assert read.request_id in ("ab" * 8, "ab" * 7 + "a", "ab" * 7)
    assert len(fit("x" * MAX_CODE, None, "ab" * 8, size)) == size
    # A digit or two less of the request id makes room for heads of paddings, not for more of a result.
    assert len(fit("", "x" * (longest + 2), "ab" * 8, size)) == size
    for more in (longest + 3, size):
        with pytest.raises(OutputRefused):
            fit("", "x" * more, "ab" * 8, size)


def test_a_reply_has_the_size_of_its_longest_result_and_code() -> None:
    """To the byte (docs/spec/operations.md, 4): a bare reply of n letters takes 63 + n, or 64 + n from 256 on."""
    longest = [size_of(Choice(("x" * length,))) for length in (1, 185, 186, 440, 441, 696, 697)]
    assert longest == [256, 256, 512, 512, 768, 768, 1024]
    assert MAX_CODE == 64 and len(Reply("x" * 64, None, "0" * 16).encode()) == 127


def test_bits() -> None:
    assert [bits(count) for count in (1, 2, 3, 256, 257)] == [0, 1, 2, 8, 9]


@pytest.mark.threat("ENC-9")
@pytest.mark.parametrize(
    "odd", ["x" * 41, "é" * 21, "\ud800", "a\x1b[2J", "a\x00", "\u202e", b"x", 1, None, ["x"], np.bytes_(b"x")]
)
def test_a_careless_operation_answers_more_than_a_text(odd: Any) -> None:
    with pytest.raises(OutputRefused):
        Text(10).check(odd)


@pytest.mark.threat("ENC-9")
@pytest.mark.parametrize(
    "odd",
    [
        [0.5] * 4, [0.5] * 2, [0.5, math.nan, 0.5], [[0.5]] * 3, "abc", b"abc", 1.0, None, np.ones((3, 1)),
        np.array(["a"] * 3), np.array([1j] * 3), [True, 0.5, 0.5], {1.0, 2.0, 3.0},
    ],
)  # fmt: skip
def test_a_careless_operation_answers_more_than_a_vector(odd: Any) -> None:
    with pytest.raises(OutputRefused):
        Vector(3, 0, 1, 10).check(odd)


@pytest.mark.threat("ENC-9")
@pytest.mark.parametrize("odd", ["maybe", b"yes", 0, None, ["yes"]])
def test_a_careless_operation_answers_more_than_a_choice(odd: Any) -> None:
    with pytest.raises(OutputRefused):
        Choice(("yes", "no")).check(odd)


@pytest.mark.threat("ENC-9")
@pytest.mark.parametrize(
    "odd", [{}, None, {"w": [1]}, {1: np.ones(1)}, {"w": np.array([object()])}, {"w": np.array(["text"])}, b"x"]
)
def test_a_careless_operation_derives_what_is_no_tensor(odd: Any) -> None:
    with pytest.raises(OutputRefused):
        Derived().check(odd)


def test_good_results_leave_in_their_closed_form() -> None:
    steps = Vector(3, 0, 1, 10).check(np.array([0.11, 5, -5], np.float32))
    assert (steps, {type(step) for step in steps}) == ([1, 10, 0], {int})
    assert Vector(3, 0, 1, 10).read(steps) == [0.1, 1.0, 0.0]

    class Loud(str):
        secret = "canary"

    for output in (Text(10), Choice(("yes", "no"))):
        assert type(output.check(Loud("yes"))) is str  # type: ignore[attr-defined]


class Shout(enum.StrEnum):
    """To ``str`` and ``int`` it is another value than to a comparison."""

    YES = "yes"

    def __str__(self) -> str:
        return "\x1b[2J" + "canary" * 20


class Large(int):
    def __int__(self) -> int:
        return 2**62


@pytest.mark.threat("ENC-9")
def test_what_was_checked_is_what_leaves() -> None:
    assert (Text(1).check(Shout.YES), Choice(("yes",)).check(Shout.YES)) == ("yes", "yes")
    with pytest.raises(OutputRefused):
        Label(10).check(Large(3))
    assert Scalar(0, 9, 9).check(Large(3)) == 9


def test_no_step_is_beyond_the_last() -> None:
    """Where a double is not the bound itself any more, the quotient can be above 1: such bounds are refused."""
    for low, high in ((-(2**53), 2**53), (-(2**53) + 1, 2**53), (-1, 2**53), (2**53 - 1, 2**53)):
        for steps in (2**53, 2**53 - 1, 3):
            number = Scalar(low, high, steps)
            assert [number.check(value) for value in (low, float(low), high, float(high))] == [0, 0, steps, steps]
            assert bits(number.check(10**400) + 1) <= number.sizes()[0]
    mean = Mean(-1, 2**31 - 1, 2**53)
    many = np.full(2**22 + 1, 2.0**31 - 1)
    assert many.mean() > 2**31 - 1  # why it is clipped after too
    assert mean.of(many, np.ones(len(many), int)) == mean.longest()


def test_arguments_of_each_type() -> None:
    good: list[tuple[Any, Any, Any]] = [
        (Choice(("yes", "no")), "no", "no"), (Text(2), "12345678", "12345678"), (Text(2), "\x00", "\x00"),
        (Scalar(0, 1, 4), 3, 0.75),
        (Derived(), reference := {"asset": "a", "digest": bytes(32), "handle": bytes(32)}, reference),
    ]  # fmt: skip
    for kind, value, meant in good:
        assert kind.decode(value) == meant
    bad: list[tuple[Any, Any]] = [
        (Choice(("yes", "no")), "maybe"), (Choice(("yes", "no")), 1), (Text(2), "123456789"), (Text(2), b"x"),
        (Scalar(0, 1, 4), 5), (Scalar(0, 1, 4), -1), (Scalar(0, 1, 4), 0.5), (Scalar(0, 1, 4), True),
        (Derived(), b"x"), (Derived(), {**reference, "more": 1}), (Derived(), {**reference, "digest": bytes(31)}),
        (Derived(), {**reference, "handle": "x"}), (Derived(), {**reference, "handle": bytes(31)}), (Derived(), {}),
        (Joined("a"), b""), (Joined("a"), {"token": b""}), (Joined("a"), {"token": b"", "invocation": "x"}),
    ]  # fmt: skip
    for kind, value in bad:
        with pytest.raises(CapabilityRefused) as refused:
            kind.decode(value)
        assert refused.value.code == "bad_argument"


def test_the_narrowest_and_widest_types_are_taken() -> None:
    assert [Label(1).check(0), Label(2).check(1), Scalar(0, 1, 1).check(0.6), Choice(("a",)).check("a")] == [
        0,
        1,
        1,
        "a",
    ]
    assert Vector(1, 0, 1, 1).check([1]) == [1] and Text(1).check("") == ""
    assert [size_of(Text(65536)), size_of(Vector(65536, 0, 1, 2**53))] == [262400, 590080]
    assert size_of(Choice(("a", "x" * 300, "b"))) == 512
    assert len(Array("uint8", (0, 3)).decode(b"")) == 0
    assert [Integer(-1, 9).decode(value) for value in (-1, 9)] == [-1, 9]
    assert [Scalar(-1, 1, 4).decode(value) for value in (0, 4)] == [-1.0, 1.0]
    assert Text(2).check("a\nü b") == "a\nü b"


def test_types_that_are_none() -> None:
    for attempt in (
        lambda: Choice(()), lambda: Choice(("a", "a")), lambda: Choice((1,)), lambda: Text(0), lambda: Text(65537),  # type: ignore[arg-type]
        lambda: Vector(0, 0, 1, 1), lambda: Vector(65537, 0, 1, 1), lambda: Vector(1, 1, 1, 1),
        lambda: Scalar(0, 1, 2**60), lambda: Scalar(0, 2**53 + 1, 1), lambda: Vector(1, -(2**53) - 1, 0, 1),
        lambda: size_of(Vector(65536, 0, 1, 2**53)) and size_of(Choice(("x" * 2**20,))),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            attempt()
