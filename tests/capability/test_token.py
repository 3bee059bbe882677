"""Tokens: chains only shrink, every changed byte is refused, and the attacks on chains by name."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolate.capability import ChainCache, Choices, Scope, Token, VerifiedToken, grant, meet, verify
from isolate.capability.token import MAX_BLOCKS, Block
from isolate.crypto import cbor
from isolate.crypto.signing import Purpose
from isolate.errors import CapabilityRefused, HolderRefused, UsageError

DIGEST = bytes([1]) * 32
SMALL_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


def test_a_chain_verifies_and_says_what_to_charge(chain: list[Any], people: Any, now: int) -> None:
    seen = verify(chain[2], people.pub(people.owner), now=now)
    assert (seen.asset, seen.owner) == ("digits", people.pub(people.owner))
    assert seen.scope.operations == {"classify": DIGEST}
    assert (seen.scope.uses, seen.scope.bytes_out, seen.scope.depth) == (5, 10_000, 5)
    assert [limit.uses for limit in seen.limits] == [1000, 10, 5]
    assert seen.handles == tuple(token.id for token in chain)
    assert seen.holders == tuple(people.pub(key) for key in (people.team, people.analyst, people.analyst))
    assert seen.holder == chain[2].holder and seen.id == chain[2].id
    assert chain[2].scope == seen.scope and chain[2].asset == "digits"


def test_bytes_and_text_lead_back_to_the_token(chain: list[Any], people: Any, now: int) -> None:
    for token in chain:
        assert Token.parse(token.encode()) == token
        assert Token.from_text("\n" + token.to_text() + "\n") == token
        assert verify(token.encode(), people.pub(people.owner), now=now).id == token.id


@pytest.mark.threat("CAP-3")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_chains_only_shrink(scopes: Any, people: Any, data: st.DataObject) -> None:
    keys = [people.team, people.analyst, people.other]
    first = data.draw(scopes)
    if first.operations is None:
        first = meet(first, Scope(operations={"classify": DIGEST}))
    token = grant(people.owner, asset="a", scope=first, holder=people.pub(people.team), nonce=bytes(16))
    holder = people.team
    for _ in range(data.draw(st.integers(0, 3))):
        after = data.draw(st.sampled_from(keys))
        try:
            token = token.attenuate(holder, data.draw(scopes), people.pub(after), nonce=bytes(16))
        except CapabilityRefused as error:
            assert error.code == "depth_exceeded"
            break
        holder = after
    moment = token.scope.not_before or 0
    if token.scope.expires is not None and token.scope.expires <= moment:
        with pytest.raises(CapabilityRefused):
            verify(token, people.pub(people.owner), now=moment)
        return
    seen = verify(token, people.pub(people.owner), now=moment)
    for wider, narrower in zip(seen.limits, seen.limits[1:], strict=False):
        assert narrower.is_within(wider)
        assert narrower.depth < wider.depth
    assert seen.scope == seen.limits[-1]
    assert seen.scope.is_within(first)


@pytest.mark.threat("CAP-4")
def test_every_byte_of_a_token_changed_is_refused(chain: list[Any], people: Any, now: int) -> None:
    owner, raw = people.pub(people.owner), chain[1].encode()
    verify(raw, owner, now=now)
    for position in range(len(raw)):
        for flip in (0x01, 0x80):
            changed = bytearray(raw)
            changed[position] ^= flip
            with pytest.raises(CapabilityRefused):
                verify(bytes(changed), owner, now=now)


@pytest.mark.threat("CAP-4")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_damage_is_refused_and_never_another_error(
    chain: list[Any], people: Any, now: int, data: st.DataObject
) -> None:
    raw = chain[2].encode()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, len(raw)))
    changed = raw[:start] + data.draw(st.binary(max_size=40)) + raw[end:]
    if changed != raw:
        with pytest.raises(CapabilityRefused):
            verify(changed, people.pub(people.owner), now=now)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60) | st.text(max_size=60).map("isolate-token-".__add__))
def test_random_text_is_refused_and_never_another_error(text: str) -> None:
    with pytest.raises(CapabilityRefused):
        Token.from_text(text)


def rebuilt(token: Token, blocks: list[int], signatures: list[int] | None = None) -> Token:
    chosen = blocks if signatures is None else signatures
    return Token(tuple(token.blocks[n] for n in blocks), tuple(token.signatures[n] for n in chosen))


@pytest.mark.threat("CAP-4")
def test_spliced_chain(chain: list[Any], people: Any, now: int) -> None:
    """A block, with its true signature, is moved onto another grant to the same holder."""
    scope = Scope(operations={"classify": DIGEST})
    other = grant(people.owner, asset="secret", scope=scope, holder=people.pub(people.team))
    spliced = Token((*other.blocks, chain[1].blocks[1]), (*other.signatures, chain[1].signatures[1]))
    with pytest.raises(CapabilityRefused, match="block 1 of the token is not signed"):
        verify(spliced, people.pub(people.owner), now=now)


@pytest.mark.threat("CAP-4")
def test_reordered_chain(chain: list[Any], people: Any, now: int) -> None:
    with pytest.raises(CapabilityRefused, match="block 1"):
        verify(rebuilt(chain[2], [0, 2, 1]), people.pub(people.owner), now=now)
    with pytest.raises(CapabilityRefused, match="malformed"):
        rebuilt(chain[2], [1, 0, 2])
    with pytest.raises(CapabilityRefused, match="block 1"):
        verify(rebuilt(chain[2], [0, 1, 2], [0, 2, 1]), people.pub(people.owner), now=now)


@pytest.mark.threat("CAP-4")
def test_truncated_chain(chain: list[Any], people: Any, now: int, call: Any) -> None:
    """Cut off at either end or within; cut off behind, it is the parent's, whose key the thief has not."""
    with pytest.raises(CapabilityRefused, match="malformed"):
        rebuilt(chain[2], [1, 2])
    with pytest.raises(CapabilityRefused, match="block 1"):
        verify(rebuilt(chain[2], [0, 2]), people.pub(people.owner), now=now)
    with pytest.raises(CapabilityRefused, match="malformed"):
        rebuilt(chain[2], [0, 1], [0])
    with pytest.raises(CapabilityRefused, match="malformed"):
        rebuilt(chain[2], [])
    parent = rebuilt(chain[2], [0])
    assert verify(parent, people.pub(people.owner), now=now).id == chain[0].id
    with pytest.raises(HolderRefused):
        call(token=parent, key=people.analyst)


@pytest.mark.threat("CAP-4")
def test_a_block_of_another_grant_by_the_same_owner_is_no_attenuation(people: Any, now: int) -> None:
    """The owner's own grant, signed for another purpose, does not pass as a block even where it holds a handle."""
    scope = Scope(operations={"classify": DIGEST})
    first = grant(people.owner, asset="a", scope=scope, holder=people.pub(people.owner))
    block = Block(Scope(), people.pub(people.thief), bytes(16)).encode()
    handle = Token((*first.blocks, block), (*first.signatures, bytes(64))).id
    forged = Token((*first.blocks, block), (*first.signatures, people.owner.sign(Purpose.GRANT, handle)))
    with pytest.raises(CapabilityRefused, match="block 1"):
        verify(forged, people.pub(people.owner), now=now)


@pytest.mark.threat("CAP-5")
@pytest.mark.parametrize("public", SMALL_ORDER, ids=lambda raw: raw.hex()[:8])
def test_small_order_key(people: Any, chain: list[Any], public: bytes) -> None:
    with pytest.raises(CapabilityRefused, match="no Ed25519 public key"):
        grant(people.owner, asset="a", scope=Scope(operations={}), holder=public)
    with pytest.raises(CapabilityRefused, match="no Ed25519 public key"):
        chain[0].attenuate(people.team, Scope(), public)


@pytest.mark.threat("CAP-5")
@pytest.mark.parametrize("sign", [0x00, 0x80])
@pytest.mark.parametrize("public", SMALL_ORDER, ids=lambda raw: raw.hex()[:8])
def test_small_order_key_in_a_block_that_somebody_else_made(
    people: Any, chain: list[Any], public: bytes, sign: int
) -> None:
    public = public[:31] + bytes([public[31] | sign])
    for number, part in ((0, "holder"), (0, "owner"), (1, "holder")):
        block = cbor.encode(cbor.decode(chain[1].blocks[number]) | {part: public})
        blocks = (block,) if number == 0 else (chain[1].blocks[0], block)
        with pytest.raises(CapabilityRefused, match=f"the {part} is no Ed25519 public key"):
            Token(blocks, chain[1].signatures[: len(blocks)])


@pytest.mark.parametrize("holder", [b"", bytes(33), bytes([2]) + bytes(31), "x" * 32], ids=repr)
def test_a_holder_that_is_no_key_gets_no_token(people: Any, chain: list[Any], holder: Any) -> None:
    with pytest.raises(CapabilityRefused, match="no Ed25519 public key"):
        grant(people.owner, asset="a", scope=Scope(operations={}), holder=holder)
    with pytest.raises(CapabilityRefused, match="no Ed25519 public key"):
        chain[0].attenuate(people.team, Scope(), holder)


@pytest.mark.threat("CAP-6")
def test_another_owner_and_a_forged_owner(chain: list[Any], people: Any, now: int) -> None:
    with pytest.raises(CapabilityRefused, match="another owner"):
        verify(chain[0], people.pub(people.thief), now=now)
    claim = chain[0].claims[0]
    block = Block(claim.scope, people.pub(people.thief), bytes(16), claim.owner, claim.asset, 1).encode()
    forged = Token((block,), (people.thief.sign(Purpose.GRANT, Token((block,), (bytes(64),)).id),))
    with pytest.raises(CapabilityRefused, match="owner's signature"):
        verify(forged, people.pub(people.owner), now=now)
    with pytest.raises(UsageError):
        verify(chain[0], b"", now=now)


@pytest.mark.threat("CAP-7")
def test_copied_token_cannot_be_passed_on_without_its_key(chain: list[Any], people: Any, now: int) -> None:
    with pytest.raises(HolderRefused):
        chain[1].attenuate(people.thief, Scope(), people.pub(people.thief))
    block = Block(Scope(), people.pub(people.thief), bytes(16)).encode()
    handle = Token((*chain[1].blocks, block), (*chain[1].signatures, bytes(64))).id
    stolen = Token((*chain[1].blocks, block), (*chain[1].signatures, people.thief.sign(Purpose.BLOCK, handle)))
    with pytest.raises(CapabilityRefused, match="block 2"):
        verify(stolen, people.pub(people.owner), now=now)


@pytest.mark.threat("CAP-8")
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_depth_is_a_limit_also_for_who_ignores_it(people: Any, now: int, depth: int) -> None:
    key, public = people.team, people.pub(people.team)
    scope = Scope(operations={"classify": DIGEST}, depth=depth)
    token = grant(people.owner, asset="a", scope=scope, holder=public)
    for _ in range(depth):
        token = token.attenuate(key, Scope(depth=2**40))
        verify(token, people.pub(people.owner), now=now)
    with pytest.raises(CapabilityRefused) as caught:
        token.attenuate(key, Scope())
    assert caught.value.code == "depth_exceeded"
    block = Block(Scope(depth=5), public, bytes(16)).encode()
    handle = Token((*token.blocks, block), (*token.signatures, bytes(64))).id
    forced = Token((*token.blocks, block), (*token.signatures, key.sign(Purpose.BLOCK, handle)))
    with pytest.raises(CapabilityRefused, match="further than allowed"):
        verify(forced, people.pub(people.owner), now=now)


@pytest.mark.threat("CAP-8")
def test_a_chain_has_at_most_eight_blocks_and_4_kib(people: Any, chain: list[Any], now: int) -> None:
    token = chain[0]
    for _ in range(MAX_BLOCKS - 1):
        token = token.attenuate(people.team, Scope())
    assert verify(token, people.pub(people.owner), now=now).scope.depth == 0
    with pytest.raises(CapabilityRefused, match="not be passed on"):
        token.attenuate(people.team, Scope())
    many = {f"operation-{number}": DIGEST for number in range(100)}
    with pytest.raises(CapabilityRefused, match="at most 4096"):
        grant(people.owner, asset="a", scope=Scope(operations=many), holder=people.pub(people.team))
    padded = [Scope(operations={}, parameters={"a": {"b": Choices(["x" * (n - 259)])}}) for n in (4096, 4097)]
    token = grant(people.owner, asset="a", scope=padded[0], holder=people.pub(people.team))
    assert len(token.encode()) == 4096 and Token.from_text(token.to_text()) == token
    with pytest.raises(CapabilityRefused, match="4097 bytes, where at most 4096"):
        grant(people.owner, asset="a", scope=padded[1], holder=people.pub(people.team))
    half = Scope(operations=dict(list(many.items())[:50]))
    token = grant(people.owner, asset="a", scope=half, holder=people.pub(people.team))
    with pytest.raises(CapabilityRefused, match="at most 4096 are allowed"):
        token.attenuate(people.team, half)


@pytest.mark.threat("CAP-9")
def test_validity_is_checked_at_the_given_time_also_from_the_cache(chain: list[Any], people: Any, now: int) -> None:
    """A clock set back by the host is no concern of this code: ``now`` is handed in, and never from the token."""
    cache, owner = ChainCache(), people.pub(people.owner)
    verify(chain[2], owner, now=now, cache=cache)
    for _ in range(2):
        with pytest.raises(CapabilityRefused) as caught:
            verify(chain[2], owner, now=now + 3600, cache=cache)
        assert caught.value.code == "expired"


def test_a_grant_of_before_the_service_was_recovered_has_ended(people: Any, now: int) -> None:
    """Also where the chain was seen in its own epoch: the cache saves signatures, never this."""
    scope, owner, cache = Scope(operations={"classify": DIGEST}), people.pub(people.owner), ChainCache()
    token = grant(people.owner, asset="a", scope=scope, holder=people.pub(people.team), epoch=2)
    narrowed = token.attenuate(people.team, Scope())
    assert (
        verify(narrowed, owner, now=now).epoch == verify(narrowed, owner, now=now, epoch=2, cache=cache).epoch == 2
    )
    for kept in (None, cache):
        for epoch in (1, 3):
            with pytest.raises(CapabilityRefused) as caught:
                verify(narrowed, owner, now=now, epoch=epoch, cache=kept)
            assert caught.value.code == "epoch_ended"


@pytest.mark.parametrize("epoch", [0, -1, 2**63, True, "1", None], ids=repr)
def test_an_epoch_that_is_none(people: Any, chain: list[Any], epoch: Any) -> None:
    with pytest.raises(CapabilityRefused):
        grant(people.owner, asset="a", scope=Scope(operations={}), holder=people.pub(people.team), epoch=epoch)
    block = cbor.encode(cbor.decode(chain[0].blocks[0]) | {"epoch": epoch})
    with pytest.raises(CapabilityRefused):
        Token((block,), (bytes(64),))


@pytest.mark.threat("CAP-10")
def test_the_cache_answers_for_the_very_bytes_and_owner_only(
    chain: list[Any], people: Any, now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, owner, raw = ChainCache(), people.pub(people.owner), chain[2].encode()
    first = verify(raw, owner, now=now, cache=cache)
    changed = Token(chain[2].blocks, (*chain[2].signatures[:2], bytes(64)))
    assert changed.id == chain[2].id
    with pytest.raises(CapabilityRefused):
        verify(changed, owner, now=now, cache=cache)
    with pytest.raises(CapabilityRefused):
        verify(raw, people.pub(people.thief), now=now, cache=cache)
    monkeypatch.setattr("isolate.capability.token.verify_signature", lambda *_: pytest.fail("not from the cache"))
    assert verify(raw, owner, now=now, cache=cache) is first
    assert verify(chain[2], owner, now=now, cache=cache) is first


def test_the_cache_is_bounded_and_forgets_the_least_used(chain: list[Any], people: Any, now: int) -> None:
    cache, owner = ChainCache(2), people.pub(people.owner)
    first = [verify(token, owner, now=now, cache=cache) for token in chain[:2]]
    assert verify(chain[0], owner, now=now, cache=cache) is first[0]
    verify(chain[2], owner, now=now, cache=cache)
    assert verify(chain[0], owner, now=now, cache=cache) is first[0]
    assert verify(chain[1], owner, now=now, cache=cache) is not first[1]


def test_the_cache_remembers_no_refusal(chain: list[Any], people: Any, now: int) -> None:
    cache = ChainCache()
    for _ in range(2):
        with pytest.raises(CapabilityRefused):
            verify(chain[0], people.pub(people.thief), now=now, cache=cache)
    assert not cache._chains


def test_siblings_have_accounts_of_their_own_below_the_parents(chain: list[Any], people: Any, now: int) -> None:
    siblings = [chain[0].attenuate(people.team, Scope(uses=10)) for _ in range(2)]
    ids = [verify(token, people.pub(people.owner), now=now).handles for token in siblings]
    assert ids[0][0] == ids[1][0] == chain[0].id
    assert ids[0][1] != ids[1][1]


@pytest.mark.threat("CAP-2")
@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"scope": {"loan": 1}},
        {"scope": {"operations": {"classify": DIGEST}, "uses": None}},
        {"scope": {"uses": 1}},
        {"nonce": bytes(15)},
        {"holder": bytes(31)},
        {"owner": b"\x01" + bytes(31)},
        {"asset": ""},
        {"asset": "a\nb"},
        {"asset": "a" * 129},
        {"asset": b"digits"},
    ],
    ids=repr,
)
def test_a_block_with_anything_unknown_is_refused(chain: list[Any], people: Any, change: dict[str, Any]) -> None:
    block = cbor.encode(cbor.decode(chain[0].blocks[0]) | change)
    with pytest.raises(CapabilityRefused):
        Token((block,), (bytes(64),))


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"blocks": [], "signatures": [], "version": 1},
        {"blocks": ["x"], "signatures": [bytes(64)], "version": 1},
        {"blocks": [b"\xa0"], "signatures": [bytes(64)], "version": 1},
        {"blocks": [b"\xa0"] * 9, "signatures": [bytes(64)] * 9, "version": 1},
    ],
    ids=repr,
)
def test_what_is_no_token_is_refused(value: Any) -> None:
    with pytest.raises(CapabilityRefused):
        Token.parse(cbor.encode(value))


def test_good_blocks_with_other_numbers_and_sizes_of_signatures(chain: list[Any]) -> None:
    one, two = chain[1].signatures
    for signatures in ((one,), (one, two, two), (one, two[:63]), (one + b"x", two), (b"", two), ()):
        with pytest.raises(CapabilityRefused, match="malformed"):
            Token(chain[1].blocks, signatures)


@pytest.mark.parametrize(
    "asset", ["", "a" * 129, "a\n", "a\u00a0", "\u2028", "\u202e", b"digits", None, 5], ids=repr
)
def test_an_asset_that_has_no_name(people: Any, asset: Any) -> None:
    with pytest.raises(CapabilityRefused, match="malformed"):
        grant(people.owner, asset=asset, scope=Scope(operations={}), holder=people.pub(people.team))
    longest = grant(people.owner, asset="ü" * 128, scope=Scope(operations={}), holder=people.pub(people.team))
    assert Token.parse(longest.encode()).asset == "ü" * 128


def test_another_version_is_refused(chain: list[Any]) -> None:
    with pytest.raises(CapabilityRefused, match="another version"):
        Token.parse(cbor.encode(cbor.decode(chain[0].encode()) | {"version": 2}))


def test_a_verified_token_cannot_be_made_by_hand(chain: list[Any], people: Any, now: int) -> None:
    seen = verify(chain[0], people.pub(people.owner), now=now)
    with pytest.raises(UsageError):
        VerifiedToken("digits", 1, seen.owner, seen.scope, seen.handles, seen.limits, seen.holders, object())
    with pytest.raises(UsageError):
        attrs.evolve(seen, asset="secret")


def test_repr_names_the_handle_and_shows_no_block(chain: list[Any]) -> None:
    assert chain[2].id.hex()[:16] in repr(chain[2])
    assert len(repr(chain[2])) < 100
