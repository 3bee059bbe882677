"""Invocations: bound to handle, holder, channel, operation and arguments, and taken once."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolate.capability import (
    Invocation,
    ReplayGuard,
    Scope,
    VerifiedInvocation,
    grant,
    hash_arguments,
    verify,
    verify_invocation,
)
from isolate.crypto.signing import Purpose
from isolate.errors import CapabilityRefused, HolderRefused, ScopeExceeded, UsageError

DIGEST, BINDING = bytes([1]) * 32, bytes([7]) * 32
ARGUMENTS = hash_arguments(b"image")


@pytest.fixture(scope="module")
def seen(chain: list[Any], people: Any, now: int) -> Any:
    return verify(chain[2], people.pub(people.owner), now=now)


def check(invocation: Invocation, seen: Any, **changes: bytes) -> VerifiedInvocation:
    return verify_invocation(
        invocation, seen, **({"channel_binding": BINDING, "argument_hash": ARGUMENTS} | changes)
    )


def test_an_invocation_survives_its_encoding_and_verifies(call: Any, seen: Any) -> None:
    invocation = call(counter=3)
    verified = check(Invocation.parse(invocation.encode()), seen)
    assert (verified.operation, verified.operation_digest, verified.counter) == ("classify", DIGEST, 3)
    assert verified.token is seen
    assert verified.id == invocation.id != call(counter=4).id
    for name in ("a", "a" * 64):
        longest = call(operation=name, counter=2**63 - 1).encode()
        assert Invocation.parse(longest).operation == name and len(longest) == 217 + len(name) <= 281


@pytest.mark.threat("CAP-7")
def test_copied_token_without_its_key(chain: list[Any], people: Any, call: Any, seen: Any) -> None:
    with pytest.raises(HolderRefused):
        call(key=people.thief)
    true = call()
    forged = Invocation(true.body, people.thief.sign(Purpose.INVOCATION, true.body))
    with pytest.raises(HolderRefused, match="not signed by the holder"):
        check(forged, seen)


@pytest.mark.threat("CAP-7")
def test_an_ancestors_key_is_not_the_holders(call: Any, people: Any, seen: Any) -> None:
    true = call()
    with pytest.raises(HolderRefused):
        check(Invocation(true.body, people.team.sign(Purpose.INVOCATION, true.body)), seen)


@pytest.mark.threat("CAP-11")
def test_replay_over_session_and_enclave(call: Any, seen: Any) -> None:
    """Every channel to every enclave has its own binding; what was signed for one is refused on another."""
    with pytest.raises(HolderRefused, match="another channel"):
        check(call(), seen, channel_binding=bytes([8]) * 32)


@pytest.mark.threat("CAP-11")
def test_replay_over_arguments(call: Any, seen: Any) -> None:
    with pytest.raises(HolderRefused, match="other arguments"):
        check(call(), seen, argument_hash=hash_arguments(b"another image"))


@pytest.mark.threat("CAP-11")
def test_replay_within_a_session(call: Any, seen: Any) -> None:
    guard = ReplayGuard(BINDING)
    guard.admit(check(call(counter=0), seen))
    guard.admit(check(call(counter=5), seen))
    for counter in (5, 4, 0):
        with pytest.raises(CapabilityRefused) as caught:
            guard.admit(check(call(counter=counter), seen))
        assert caught.value.code == "replayed"
    guard.admit(check(call(counter=6), seen))
    with pytest.raises(CapabilityRefused, match="another channel"):
        ReplayGuard(bytes(32)).admit(check(call(counter=7), seen))


@pytest.mark.threat("CAP-11")
def test_replay_under_another_handle_of_the_same_holder(
    chain: list[Any], people: Any, call: Any, seen: Any, now: int
) -> None:
    wider = verify(chain[1], people.pub(people.owner), now=now)
    assert wider.holder == seen.holder
    with pytest.raises(HolderRefused, match="another handle"):
        check(call(), wider)


@pytest.mark.threat("CAP-12")
@pytest.mark.parametrize(
    ("operation", "digest"),
    [("score", bytes([2]) * 32), ("classify", bytes([2]) * 32), ("export", DIGEST), ("classify ", DIGEST)],
)
def test_an_operation_outside_the_scope(call: Any, seen: Any, operation: str, digest: bytes) -> None:
    with pytest.raises(ScopeExceeded):
        check(call(operation=operation, operation_digest=digest), seen)


@pytest.mark.threat("CAP-12")
def test_confused_deputy(people: Any, call: Any, seen: Any, now: int) -> None:
    """Who holds a narrow and a wide handle cannot have the narrow one's invocation judged by the wide one."""
    scope = Scope(operations={"classify": DIGEST, "score": bytes([2]) * 32})
    wide = grant(people.owner, asset="digits", scope=scope, holder=people.pub(people.analyst))
    verified = verify(wide, people.pub(people.owner), now=now)
    invocation = call(operation="score", operation_digest=bytes([2]) * 32)
    with pytest.raises(HolderRefused, match="another handle"):
        check(invocation, verified)
    with pytest.raises(ScopeExceeded):
        check(invocation, seen)


@pytest.mark.threat("CAP-11")
def test_every_byte_of_an_invocation_changed_is_refused(call: Any, seen: Any) -> None:
    raw = call().encode()
    for position in range(len(raw)):
        for flip in (0x01, 0x80):
            changed = bytearray(raw)
            changed[position] ^= flip
            with pytest.raises(CapabilityRefused):
                check(Invocation.parse(bytes(changed)), seen)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_damage_is_refused_and_never_another_error(call: Any, seen: Any, data: st.DataObject) -> None:
    raw = call().encode()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, len(raw)))
    changed = raw[:start] + data.draw(st.binary(max_size=40)) + raw[end:]
    if changed != raw:
        with pytest.raises(CapabilityRefused):
            check(Invocation.parse(changed), seen)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (slice(0, 1), b"\x02"),  # another version
        (slice(0, 1), b""),
        (slice(1, 2), b"\x80"),  # a counter of 2^63
        (slice(153, None), b""),  # no name
        (slice(153, None), b"x" * 65),
        (slice(153, None), "clässify".encode()),
    ],
    ids=repr,
)
def test_a_malformed_body_is_refused(call: Any, people: Any, place: slice, change: bytes) -> None:
    body = bytearray(call().body)
    body[place] = change
    with pytest.raises(CapabilityRefused, match="malformed"):
        Invocation(bytes(body), people.analyst.sign(Purpose.INVOCATION, bytes(body)))


def test_a_signature_of_another_size_is_malformed(call: Any) -> None:
    made = call()
    for signature in (made.signature[:63], made.signature + b"x", b""):
        with pytest.raises(CapabilityRefused) as caught:
            Invocation(made.body, signature)
        assert caught.value.code == "invocation_malformed"


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": b""},
        {"channel_binding": bytearray(32)},
        {"counter": -1},
        {"counter": 2**63},
        {"counter": True},
        {"argument_hash": bytes(31)},
        {"operation_digest": bytes(33)},
        {"operation": ""},
        {"operation": "x" * 65},
        {"operation": "clässify"},
    ],
    ids=repr,
)
def test_signing_refuses_what_nobody_would_take(call: Any, change: dict[str, Any]) -> None:
    with pytest.raises(CapabilityRefused):
        call(**change)


def test_a_verified_invocation_cannot_be_made_by_hand(call: Any, seen: Any) -> None:
    made = check(call(), seen)
    with pytest.raises(UsageError):
        VerifiedInvocation(
            seen, made.id, made.operation, DIGEST, ARGUMENTS, BINDING, made.nonce, made.counter, object()
        )
    with pytest.raises(UsageError):
        attrs.evolve(made, operation="export")
