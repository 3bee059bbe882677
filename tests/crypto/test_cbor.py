"""Deterministic CBOR: one encoding per value, and hostile bytes are refused with one error."""

from __future__ import annotations

import time
from enum import IntEnum, StrEnum
from typing import Any

import cbor2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isolate.crypto import cbor
from isolate.errors import MalformedError, UsageError

scalars = (
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=80) | st.text(max_size=80)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=30), inner, max_size=5)
        | st.dictionaries(st.integers(-(2**64), 2**64 - 1), inner, max_size=5)
    ),
    max_leaves=20,
)


@given(values)
def test_round_trip(value: Any) -> None:
    encoded = cbor.encode(value)
    assert cbor.decode(encoded) == value
    assert cbor2.loads(encoded) == value


@given(values, st.data())
def test_a_changed_byte_is_refused_or_is_the_encoding_of_another_value(value: Any, data: st.DataObject) -> None:
    encoded = bytearray(cbor.encode(value))
    index = data.draw(st.integers(0, len(encoded) - 1))
    encoded[index] ^= data.draw(st.integers(1, 255))
    try:
        other = cbor.decode(encoded)
    except MalformedError:
        return
    assert cbor.encode(other) == encoded
    # By encoding: to Python, 1 == True.
    assert cbor.encode(other) != cbor.encode(value)


@pytest.mark.threat("KEY-5")
@settings(max_examples=500)
@given(st.binary(max_size=64))
@example(b"")
@example(b"\x9f\xff")
def test_any_bytes_are_refused_or_are_the_encoding_of_their_value(data: bytes) -> None:
    try:
        value = cbor.decode(data)
    except MalformedError:
        return
    assert cbor.encode(value) == data
    assert cbor.encode(cbor2.loads(data)) == data


@given(values, st.data())
def test_every_truncation_and_extension_is_refused(value: Any, data: st.DataObject) -> None:
    encoded = cbor.encode(value)
    with pytest.raises(MalformedError):
        cbor.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
    with pytest.raises(MalformedError):
        cbor.decode(encoded + data.draw(st.binary(min_size=1, max_size=4)))


REFUSED = {
    "indefinite list": "9f01ff",
    "indefinite map": "bf0102ff",
    "indefinite bytes": "5f4101ff",
    "indefinite text": "7f6161ff",
    "a break alone": "ff",
    "repeated key": "a2616101616102",
    "repeated integer key": "a201010102",
    "keys out of order": "a2616201616101",
    "the older order, by length first": "a3" + "6162" + "01" + "6163" + "01" + "626161" + "01" + "00",
    "integer keys in order of value": "a2200001 00".replace(" ", ""),
    "mixed keys": "a201016161 01".replace(" ", ""),
    "key that is a list": "a1810101",
    "key that is a map": "a1a001",
    "key that is bytes": "a1416101",
    "key that is true": "a1f501",
    "key that is null": "a1f601",
    "key that is a float": "a1f93c0001",
    "integer in two bytes": "1801",
    "integer 23 in two bytes": "1817",
    "integer in three bytes": "1900ff",
    "integer in five bytes": "1a0000ffff",
    "integer in nine bytes": "1b00000000ffffffff",
    "negative integer in two bytes": "3801",
    "length in two bytes": "580161",
    "text length in two bytes": "780161",
    "list count in two bytes": "980101",
    "map count in two bytes": "b8010101",
    "half float": "f93c00",
    "float": "fa3f800000",
    "double": "fb3ff0000000000000",
    "not a number": "f97e00",
    "undefined": "f7",
    "simple value": "e0",
    "simple value in two bytes": "f8ff",
    "false in two bytes": "f814",
    "reserved length 28": "1c",
    "reserved length 30": "1e",
    "trailing byte": "0100",
    "empty": "",
    "text that is not UTF-8": "61ff",
    "text with a surrogate": "63eda080",
    "overlong UTF-8": "62c080",
    "a list that promises 2**64 items": "9bffffffffffffffff",
    "a map that promises 2**32 entries": "ba" + "ffffffff",
    "a text of 2**63 bytes": "7b8000000000000000",
    "17 lists": "81" * 17 + "00",
    "17 lists, the last empty": "81" * 16 + "80",
    "17 maps": "a100" * 17 + "00",
    "100000 lists": "81" * 100_000,
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_deterministic_is_refused(data: str) -> None:
    with pytest.raises(MalformedError):
        cbor.decode(bytes.fromhex(data))


@pytest.mark.parametrize("tag", [0, 1, 2, 3, 4, 5, 24, 25, 28, 29, 30, 35, 36, 37, 256, 258, 55799, 2**32])
def test_every_tag_is_refused(tag: int) -> None:
    for inner in (0, b"1", "1", [1, 2]):
        with pytest.raises(MalformedError, match="tag"):
            cbor.decode(cbor2.dumps(cbor2.CBORTag(tag, inner)))


@pytest.mark.threat("KEY-4")
def test_hostile_bytes_cost_no_more_than_their_length() -> None:
    """Each of these took a general decoder gigabytes or minutes, before any check could refuse it."""
    references = bytes.fromhex("d901009a00009c415a000186a0") + b"x" * 100_000 + b"\xd8\x19\x00" * 40_000
    keys = b"".join(b"\x90" + bytes(0x20 + (n >> bit & 1) for bit in range(16)) + b"\x01" for n in range(2**13))
    colliding = b"\xb9\x20\x00" + keys
    pattern = b"\xd8\x23\x7a" + (90_000).to_bytes(4, "big") + b"[a-z]{1,9}" * 9_000
    start = time.process_time()
    for data in (references, colliding, pattern):
        with pytest.raises(MalformedError):
            cbor.decode(data)
    assert time.process_time() - start < 0.5


def test_size_limits_count_bytes() -> None:
    encoded = cbor.encode(bytes(100))
    assert cbor.decode(encoded, max_size=len(encoded)) == bytes(100)
    with pytest.raises(MalformedError, match="at most"):
        cbor.decode(encoded, max_size=len(encoded) - 1)
    words = memoryview(bytearray(cbor.encode(bytes(30)))).cast("I")
    assert (len(words), words.nbytes) == (8, 32)
    assert cbor.decode(words) == bytes(30)
    with pytest.raises(MalformedError, match="at most"):
        cbor.decode(words, max_size=31)
    with pytest.raises(MalformedError, match="at most"):
        cbor.decode(bytes(cbor.MAX_SIZE + 1))


class Word(StrEnum):
    A = "a"


class Number(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("value", "plain"),
    [((1, 2), [1, 2]), (bytearray(b"x"), b"x"), (memoryview(b"x"), b"x"), (Word.A, "a"), (Number.ONE, 1)],
)
def test_relatives_are_written_as_their_plain_form(value: Any, plain: Any) -> None:
    assert cbor.encode(value) == cbor.encode(plain)
    assert cbor.encode({Word.A: value}) == cbor.encode({"a": plain})


@pytest.mark.parametrize(
    "value",
    [
        1.5, {1}, object(), 2**64, -(2**64) - 1, {b"k": 1}, {True: 1}, {1: 1, "a": 1}, {None: 1}, {(1,): 1},
        "\ud800", {"\udfff": 1}, [1.5], {"a": {"b": 1.5}}, cbor2.undefined, cbor2.CBORTag(1, 1),
    ],
    ids=repr,
)  # fmt: skip
def test_values_outside_the_profile_are_refused(value: Any) -> None:
    with pytest.raises(UsageError):
        cbor.encode(value)


def test_what_can_be_written_can_be_read() -> None:
    nested: Any = []
    for _ in range(cbor.MAX_DEPTH - 1):
        nested = [nested]
    assert cbor.decode(cbor.encode(nested)) == nested
    for inner in ([nested], {"a": nested}):
        with pytest.raises(UsageError, match="deep"):
            cbor.encode(inner)
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    with pytest.raises(UsageError, match="deep"):
        cbor.encode(cyclic)


@pytest.mark.parametrize(
    "value",
    [[], None, 1, {}, {"n": 1, "m": 2}, {"m": 1}, {1: 1}, {"n": True}, {"n": "1"}, {"n": b"1"}, {"n": None}],
)
def test_a_record_has_exactly_its_fields(value: Any) -> None:
    with pytest.raises(MalformedError):
        cbor.record(cbor.encode(value), {"n": int})


def test_a_refused_field_name_cannot_write_to_a_terminal() -> None:
    with pytest.raises(MalformedError) as caught:
        cbor.check({"\x1b[2J\n": 1, "\u202e": 2}, {})
    assert str(caught.value).isprintable()
    assert str(caught.value).isascii()
    with pytest.raises(MalformedError) as caught:
        cbor.check({"x" * 10_000: 1}, {})
    assert len(str(caught.value)) < 300
