"""Operations: arguments of their declared type go in, results of their declared type come out."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest

from isolate.enclave.operations import Array, Integer, Label, Operation, Scalar, operation
from isolate.errors import CapabilityRefused, IsolateError, OutputRefused, UsageError


def make(result: Any, output: Any) -> Operation:
    @operation(inputs={}, output=output)
    def answer(view: Any) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    return answer


@pytest.mark.threat("ENC-9")
@pytest.mark.parametrize(
    "odd",
    [
        10, -1, True, np.bool_(True), 1.0, "1", b"1", None, [1], np.ones(1, int), np.float32(1), 10**30, -(10**30),
        {"w": 1}, object(), 1j,
    ],
)  # fmt: skip
def test_a_careless_operation_answers_more_than_a_label(odd: Any) -> None:
    with pytest.raises(OutputRefused) as refused:
        make(odd, Label(10)).run({}, {})
    assert refused.value.code == "output_refused"


@pytest.mark.threat("ENC-9")
@pytest.mark.parametrize(
    "odd",
    [math.nan, math.inf, -math.inf, np.float64("nan"), "1", None, [1.0], np.ones(2), 1j, np.complex64(1), True],
)
def test_a_careless_operation_answers_more_than_a_scalar(odd: Any) -> None:
    with pytest.raises(OutputRefused):
        make(odd, Scalar(0, 1, 100)).run({}, {})


def test_good_results_leave_in_their_closed_form() -> None:
    for good in (3, np.int64(3), np.uint8(3)):
        result = make(good, Label(10)).run({}, {})
        assert (result, type(result)) == (3, int)
    for good, step in ((0.5, 50), (2, 100), (-5, 0), (10**400, 100), (np.float32(0.25), 25), (np.float16(1), 100)):
        result = make(good, Scalar(0, 1, 100)).run({}, {})
        assert (result, type(result)) == (step, int)


@pytest.mark.threat("ENC-10")
@pytest.mark.parametrize(
    "error",
    [
        ValueError("canary"), KeyError("canary"), OutputRefused("canary", code="canary"), IsolateError("canary"),
        SystemExit("canary"), KeyboardInterrupt("canary"),
    ],
)  # fmt: skip
def test_an_operations_exception_leaks_nothing(error: BaseException) -> None:
    with pytest.raises(CapabilityRefused) as refused:
        make(error, Label(2)).run({}, {})
    assert refused.value.code == "operation_failed"
    assert "canary" not in str(refused.value) + repr(vars(refused.value))
    assert refused.value.__suppress_context__


def test_arguments_of_another_type_are_refused() -> None:
    @operation(inputs={"image": Array("uint8", (2, 2)), "number": Integer(1, 5)}, output=Label(2))
    def look(view: Any, image: Any, number: int) -> int:
        assert image.shape == (2, 2)
        assert not image.flags.writeable
        return 1

    good: dict[str, Any] = {"image": bytes(4), "number": 5}
    assert look.run({}, look.decode(good)) == 1
    for change in (
        {"image": bytes(5)}, {"image": bytearray(4)}, {"image": [0] * 4}, {"image": None}, {"number": 0},
        {"number": 6}, {"number": True}, {"number": "1"}, {"number": 1.0}, {"more": 1},
    ):  # fmt: skip
        with pytest.raises(CapabilityRefused) as refused:
            look.decode({**good, **change})
        assert refused.value.code == "bad_argument"
    with pytest.raises(CapabilityRefused):
        look.decode({"image": bytes(4)})


def test_types_that_are_none() -> None:
    for attempt in (
        lambda: Array("O", (1,)), lambda: Array("no such", (1,)), lambda: Array("U4", (1,)),
        lambda: Array("uint8", (-1,)), lambda: Label(0), lambda: Scalar(1, 1, 1), lambda: Scalar(0, 1, 0),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            attempt()
    with pytest.raises(UsageError):
        operation(inputs={}, output=Label(2))(len)
    with pytest.raises(UsageError):
        operation(inputs={}, output=Label(2))(lambda view: 1)


@pytest.mark.threat("ENC-11")
def test_a_digest_names_code_schema_and_version() -> None:
    def first(view: Any) -> int:
        return 1

    def second(view: Any) -> int:
        return 2

    def digest(function: Any, name: str = "op", **changes: Any) -> bytes:
        function.__name__ = name
        fields: dict[str, Any] = {"inputs": {}, "output": Label(10), "version": 1}
        return operation(**(fields | changes))(function).digest

    same = digest(first)
    assert digest(first) == same
    others = [
        digest(second), digest(first, "other"), digest(first, version=2), digest(first, output=Label(11)),
        digest(first, inputs={"n": Integer(0, 1)}), digest(first, output=Scalar(0, 1, 10)),
        digest(first, seeded=True), digest(first, price=first), digest(first, price=second),
    ]  # fmt: skip
    assert len({same, *others}) == 10


def one_price(number: int) -> int:
    return number


@operation(inputs={"number": Integer(-1, 9), "image": Array("uint8", (2, 3))}, output=Label(10), price=one_price)
def documented(view: Any, image: Any, number: int) -> int:
    return number


@pytest.mark.threat("ENC-11")
def test_a_digest_is_made_as_the_specification_says() -> None:
    """docs/spec/operations.md, 1, byte by byte; the maps of CBOR sort their names by length."""
    source = (
        '@operation(inputs={"number": Integer(-1, 9), "image": Array("uint8", (2, 3))}, output=Label(10), '
        "price=one_price)\ndef documented(view: Any, image: Any, number: int) -> int:\n    return number\n"
    )
    price = "def one_price(number: int) -> int:\n    return number\n"
    parts = [
        b"\x86\x6adocumented\x01\x82\xa2",
        b"\x65image\x83\x65array\x65uint8\x82\x02\x03", b"\x66number\x83\x67integer\x20\x09",
        b"\x82\x65label\x0a", bytes([0x78, len(source)]), source.encode(), b"\xf4",
        bytes([0x78, len(price)]), price.encode(),
    ]  # fmt: skip
    assert documented.digest == hashlib.sha256(b"isolate/v1/operation\0" + b"".join(parts)).digest()


def test_a_price_is_at_least_the_reply_and_at_most_an_account() -> None:
    def priced(price: Any) -> Operation:
        @operation(inputs={"top": Integer(0, 9)}, output=Label(2), price=price)
        def search(view: Any, top: int) -> int:
            return 1

        return search

    assert [priced(None).cost({"top": 3}), priced(lambda top: top * 1000).cost({"top": 3})] == [256, 3000]
    assert [priced(lambda top: -5).cost({"top": 3}), priced(lambda top: 10**30).cost({"top": 3})] == [256, 2**32]
    with pytest.raises(CapabilityRefused) as refused:
        priced(lambda top: 1 // 0).cost({"top": 3})
    assert refused.value.code == "bad_argument"
    with pytest.raises(UsageError, match="seed"):
        operation(inputs={"seed": Integer(0, 1)}, output=Label(2), seeded=True)(make)
    assert operation(inputs={"seed": Integer(0, 1)}, output=Label(2))(make).inputs == {"seed": Integer(0, 1)}


@pytest.mark.threat("ENC-33")
def test_an_operation_without_aggregates_takes_no_handle_with_a_minimum_group() -> None:
    assert make(1, Label(2)).under(0).run({}, {}) == 1
    with pytest.raises(CapabilityRefused) as refused:
        make(1, Label(2)).under(2)
    assert refused.value.code == "not_enforced"
