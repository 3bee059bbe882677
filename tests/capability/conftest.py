"""Keys, a token of three blocks, and hypothesis strategies for scopes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st

from isolate.capability import Choices, Invocation, Range, Scope, grant, hash_arguments
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey

NOW = 1_800_000_000


def digest(number: int) -> bytes:
    return bytes([number]) * 32


@pytest.fixture(scope="session")
def people() -> Any:
    """Signing keys by role: ``people.owner`` and so on; ``people.pub(key)`` is the Ed25519 public key."""
    names = ["owner", "team", "analyst", "thief", "other"]
    keys = {name: SigningKey(Secret(bytes([number + 1]) * 32)) for number, name in enumerate(names)}
    return SimpleNamespace(pub=lambda key: key.verifying_key.ed25519, **keys)


@pytest.fixture(scope="session")
def now() -> int:
    return NOW


@pytest.fixture(scope="session")
def chain(people: Any) -> list[Any]:
    """The owner's grant to the team, the team's to the analyst, the analyst's narrower one for itself."""
    scope = Scope(
        operations={"classify": digest(1), "score": digest(2)}, uses=1000, bytes_out=10_000, expires=NOW + 3600
    )
    first = grant(people.owner, asset="digits", scope=scope, holder=people.pub(people.team), nonce=bytes(16))
    narrow = Scope(operations={"classify": digest(1)}, uses=10)
    second = first.attenuate(people.team, narrow, people.pub(people.analyst), nonce=bytes(16))
    third = second.attenuate(people.analyst, Scope(uses=5), nonce=bytes(16))
    return [first, second, third]


@pytest.fixture(scope="session")
def call(people: Any, chain: list[Any]) -> Any:
    """``call(**changes)``: an invocation of the three-block token with some of what is signed changed."""

    def make(**changes: Any) -> Invocation:
        token = changes.pop("token", chain[-1])
        key = changes.pop("key", people.analyst)
        values = {
            "operation": "classify",
            "operation_digest": digest(1),
            "argument_hash": hash_arguments(b"image"),
            "channel_binding": digest(7),
            "nonce": bytes(16),
            "counter": 1,
        }
        return Invocation.sign(token, key, **(values | changes))

    return make


@pytest.fixture(scope="session")
def scopes() -> Any:
    """A strategy for scopes, drawn from few values so that they often meet."""
    small = st.none() | st.integers(0, 3) | st.integers(0, 2**63 - 1)
    names = st.sampled_from(["classify", "score", "search"])
    bounds = st.tuples(st.integers(-4, 4), st.integers(-4, 4)).map(sorted)
    choices = st.frozensets(st.integers(-3, 3) | st.sampled_from(["a", "b", ""]), max_size=4).map(Choices)
    constraints = bounds.map(lambda pair: Range(*pair)) | choices
    limits = st.dictionaries(st.sampled_from(["k", "top"]), constraints, max_size=2)
    outputs = st.fixed_dictionaries(
        {},
        optional={
            "label": st.tuples(st.integers(0, 9)),
            "vector": st.tuples(st.integers(0, 9), st.integers(0, 9)),
            "handle": st.just(()),
        },
    )
    return st.builds(
        Scope,
        operations=st.none() | st.dictionaries(names, st.integers(0, 2).map(digest), max_size=3),
        parameters=st.none() | st.dictionaries(names, limits, max_size=2),
        outputs=st.none() | outputs,
        uses=small,
        bytes_out=small,
        rates=st.none() | st.dictionaries(st.integers(1, 4), st.integers(0, 9), max_size=3),
        minimum_group=small,
        not_before=small,
        expires=small,
        depth=small,
        lease=small,
    )
