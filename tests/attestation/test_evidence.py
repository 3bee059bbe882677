"""The envelope and what evidence is bound to."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from isolate.attestation.evidence import (
    Envelope,
    KeyDigests,
    Part,
    Runtime,
    Slot,
    Submod,
    gpu_nonce,
    instance_id,
    keys_digest,
)
from isolate.crypto import cbor
from isolate.errors import EvidenceRefused, IsolateError, MalformedError, UsageError

RUNTIME = Runtime(
    kind="nitro",
    nonce=b"n" * 32,
    keys_digest=b"k" * 32,
    purpose="train",
    slot=Slot("job", 3, 7),
    submods=(Submod("nvidia-gpu", b"g" * 32),),
)
ENVELOPE = Envelope("nitro", b"evidence", (b"one", b"two"), RUNTIME, (Part("nvidia-gpu", b"gpu"),))


def test_keys_digest_is_the_hash_of_a_map_of_hashes() -> None:
    keys = {"sign": b"s" * 64, "channel": b"c" * 32}
    expected = cbor.encode({name: hashlib.sha256(key).digest() for name, key in keys.items()})
    assert keys_digest(keys) == hashlib.sha256(expected).digest()
    assert instance_id(keys_digest(keys)) == hashlib.sha256(b"isolate/instance/v1" + keys_digest(keys)).digest()
    assert KeyDigests.parse(expected) == KeyDigests.of(keys)


@pytest.mark.threat("ATT-1")
def test_a_key_that_was_not_attested_is_refused() -> None:
    digests = KeyDigests.of({"channel": b"c" * 32})
    digests.check("channel", b"c" * 32)
    for purpose, key in (("channel", b"d" * 32), ("sign", b"c" * 32), ("channel", b"c" * 31), ("channel", b"")):
        with pytest.raises(EvidenceRefused) as refused:
            digests.check(purpose, key)
        assert refused.value.code == "key_not_attested"


def test_only_known_purposes_and_sizes_are_bound() -> None:
    for keys in ({}, {"other": b"x" * 32}, {"channel": b"c" * 31}):
        with pytest.raises(UsageError):
            KeyDigests.of(keys)
    with pytest.raises(MalformedError):
        KeyDigests({"channel": b"short"})


def test_round_trip() -> None:
    assert Runtime.parse(RUNTIME.encode()) == RUNTIME
    assert Envelope.parse(ENVELOPE.encode()) == ENVELOPE


def test_the_binding_covers_every_field() -> None:
    others: dict[str, Any] = {
        "profile": "isolate/runtime/v2",
        "kind": "tdx",
        "nonce": b"m" * 32,
        "keys_digest": b"l" * 32,
        "purpose": "serve",
        "slot": Slot("job", 3, 8),
        "submods": (),
    }
    assert set(others) == {one.name for one in Runtime.__attrs_attrs__}
    bindings = {evolve(RUNTIME, **{name: value}).binding() for name, value in others.items()}
    assert len(bindings) == len(others) and RUNTIME.binding() not in bindings
    assert RUNTIME.binding() == hashlib.sha512(b"isolate/attest/v1" + RUNTIME.encode()).digest()


def test_a_gpu_nonce_is_of_one_session_and_one_instance() -> None:
    nonces = {gpu_nonce(b"n", b"k" * 32), gpu_nonce(b"m", b"k" * 32), gpu_nonce(b"n", b"l" * 32)}
    assert len(nonces) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": b"x" * 65}, {"keys_digest": b"x" * 31}, {"purpose": ""}, {"purpose": "a\nb"}, {"kind": "x" * 129},
        {"submods": (Submod("gpu", b"g" * 32),) * 17},
    ],
)  # fmt: skip
def test_limits_of_a_runtime_map(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        evolve(RUNTIME, **change)


def test_limits_of_a_slot_and_a_part() -> None:
    for job, rank, generation in (("", 0, 0), ("j", -1, 0), ("j", 2**32, 0), ("j", 0, -1), ("j", 0, 2**63)):
        with pytest.raises(MalformedError):
            Slot(job, rank, generation)
    for evidence, collateral in ((b"", ()), (b"x" * 65537, ()), (b"x", (b"",) * 17), (b"x", (b"x" * 131073,))):
        with pytest.raises(MalformedError):
            Part("nitro", evidence, collateral)


def test_an_envelope_of_another_format_is_refused() -> None:
    value = cbor.decode(ENVELOPE.encode())
    with pytest.raises(MalformedError):
        Envelope.parse(cbor.encode(value | {"format": "isolate/evidence/v2"}))
    with pytest.raises(MalformedError):
        Envelope.parse(cbor.encode(value | {"extra": 1}))
    with pytest.raises(MalformedError):
        Envelope.parse(cbor.encode(value | {"collateral": [1]}))


@given(st.data())
def test_no_bytes_raise_anything_but_our_own(data: st.DataObject) -> None:
    encoded = bytearray(ENVELOPE.encode())
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    for parse in (Envelope.parse, Runtime.parse, KeyDigests.parse):
        try:
            parse(bytes(encoded))
        except IsolateError:
            continue
