"""Key derivation: labels and contexts that cannot be confused."""

from __future__ import annotations

import itertools

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from isolate.crypto import cbor
from isolate.crypto.kdf import Label, derive
from isolate.crypto.secret import Secret
from isolate.errors import UsageError

ROOT = Secret(bytes(range(32)))


class Purpose(Secret):
    size = 32


def test_labels_are_unique_and_of_one_form() -> None:
    values = [label.value for label in Label]
    assert len(values) == len(set(values)) == len(Label.__members__)
    assert all(value.startswith("isolate/v1/") and value.isascii() for value in values)


def test_another_implementation_derives_the_same() -> None:
    """The info is the CBOR of [label, context...], as docs/spec/crypto.md says."""
    info = cbor.encode([Label.SEALED_COMPARTMENT.value, b"c1", 7])
    other = HKDF(SHA256(), 32, b"salt", info).derive(bytes(range(32)))
    assert derive(ROOT, Label.SEALED_COMPARTMENT, b"c1", 7, salt=b"salt").equals(other)


def test_no_two_contexts_give_one_key() -> None:
    contexts: list[tuple[bytes | int | str, ...]] = [
        (), (b"",), ("",), (0,), (b"a", b"b"), (b"ab",), (b"a", "b"), ("ab",), (b"", b"ab"), (1,), (b"1",), ("1",)
    ]  # fmt: skip
    keys = [
        bytes(derive(ROOT, label, *context).expose())
        for label, context in itertools.product((Label.SEALED_TABLE, Label.SEALED_CHUNKS), contexts)
    ]
    assert len(set(keys)) == len(keys)


def test_the_class_asked_for_comes_back() -> None:
    assert type(derive(ROOT, Label.SEALED_TABLE, into=Purpose)) is Purpose
    with pytest.raises(UsageError, match="32 bytes"):
        derive(ROOT, Label.SEALED_TABLE, length=16, into=Purpose)


@pytest.mark.parametrize("length", [-1, 0, 8161])
def test_lengths_out_of_range(length: int) -> None:
    with pytest.raises(UsageError, match="8160"):
        derive(ROOT, Label.SEALED_TABLE, length=length)


def test_a_wiped_key_derives_nothing() -> None:
    key = Secret(bytes(32))
    key.wipe()
    with pytest.raises(UsageError, match="wiped"):
        derive(key, Label.SEALED_TABLE)
