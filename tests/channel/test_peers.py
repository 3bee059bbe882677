"""What is shown, to the last byte that it may have: with odd keys, stolen, replayed; and what is forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from isolate.attestation.evidence import KeyDigests
from isolate.channel import Handshake
from isolate.channel.handshake import Event, Terms
from isolate.channel.peers import MAX_SHOWN, Statement, check_pins, show, verify_attested
from isolate.channel.record import Kind
from isolate.crypto import cbor
from isolate.errors import HandshakeRefused, MalformedError, UsageError

Shake = Callable[..., None]
STATEMENT = Statement("initiator", bytes(32), bytes(32), bytes(32), bytes(32), b"")


def test_the_most_that_may_be_shown_is_taken_and_no_more(world: Any) -> None:
    identity = world.attested(1)
    fixed = len(cbor.record(show(identity, STATEMENT), {"shown": bytes, "signature": bytes})["shown"])

    def shown(size: int) -> bytes:
        # The length of a longer byte string takes two bytes more.
        return show(evolve(identity, evidence=lambda _: bytes(size)), STATEMENT, fresh=True)

    most = shown(MAX_SHOWN - fixed - 2)
    assert len(cbor.record(most, {"shown": bytes, "signature": bytes})["shown"]) == MAX_SHOWN
    verify_attested(most, STATEMENT, world.expect(1), identity.curve.public)
    with pytest.raises(UsageError, match="at most"):
        shown(MAX_SHOWN - fixed - 1)
    with pytest.raises(UsageError, match="token"):
        show(evolve(identity, token="x" * 8193), STATEMENT)
    with pytest.raises(HandshakeRefused):
        verify_attested(most + bytes(200), STATEMENT, world.expect(1), identity.curve.public)


class Odd:
    """A verifying key of five bytes."""

    verifying_key: Any
    to_bytes = staticmethod(lambda: b"abcde")
    sign = staticmethod(lambda purpose, message: bytes(64))


Odd.verifying_key = Odd


@pytest.mark.parametrize("renewal", [False, True])
def test_an_attested_key_of_another_length_is_refused_by_type(
    world: Any, shake: Shake, sides: Callable[..., Any], renewal: bool
) -> None:
    """A key digest tells no length: whoever attests an odd key must not reach an error that is the caller's."""
    mine = world.attested(0)
    digests = {**mine.keys.digests, "sign": hashlib.sha256(b"abcde").digest()}
    odd = evolve(mine, token="")
    for name, value in (("keys", KeyDigests(digests)), ("sign", Odd)):
        object.__setattr__(odd, name, value)
    object.__setattr__(odd, "token", world.renewed(odd))
    if not renewal:
        one = Handshake(initiator=True, identity=odd, expect=world.expect(1))
        with pytest.raises(HandshakeRefused) as refused:
            shake(one, world.pair()[1])
        assert refused.value.code == "key_format"
        return
    other = Handshake(initiator=False, identity=world.attested(1), expect=world.expect(0))
    both = sides((Handshake(initiator=True, identity=mine, expect=world.expect(1)), other))
    both.one.standing._identity = odd
    body = both.one.standing.again(both.one._sealer.sequence, now=True)
    with pytest.raises(HandshakeRefused):
        both.deliver(bytes(both.one._seal(Kind.ATTEST, memoryview(body))))


@pytest.mark.parametrize("bent", [
    {"salt": b""}, {"salt": bytes(33)}, {"rank": True}, {"rank": "1"}, {"lineage": b"x"}, {"fresh": 1},
    {"job": None}, {"more": 1},
])  # fmt: skip
def test_terms_of_another_form_are_refused(bent: dict[str, Any]) -> None:
    good = {
        "salt": bytes(32), "job": "j", "group": "", "rank": None, "lineage": None, "least_sequence": 0,
        "fresh": False,
    }  # fmt: skip
    assert Terms.parse(cbor.encode(good)).job == "j"
    with pytest.raises(MalformedError):
        Terms.parse(cbor.encode({**good, **bent}))


@pytest.mark.threat("CHAN-16")
@pytest.mark.parametrize("thief", [0, 1], ids=["the initiator", "the responder"])
def test_a_stolen_token_beside_other_keys_is_refused(world: Any, shake: Shake, thief: int) -> None:
    """Token, keys, static key and signature are each genuine, and do not belong together."""
    stolen, identities = world.attested(thief).token, [world.attested(0), world.attested(1)]
    identities[thief] = evolve(identities[thief], token=stolen)
    one = Handshake(initiator=True, identity=identities[0], expect=world.expect(1))
    other = Handshake(initiator=False, identity=identities[1], expect=world.expect(0))
    with pytest.raises(HandshakeRefused) as refused:
        shake(one, other)
    assert refused.value.code == "key_not_attested" and not (other, one)[thief].done


@pytest.mark.threat("CHAN-10")
def test_a_token_that_was_good_before_is_looked_at_again(world: Any, shake: Shake) -> None:
    """Its signature is remembered; its time is not: in later handshakes it has run out, or is of the future."""
    identities = [world.attested(0), world.attested(1)]

    def again() -> None:
        one = Handshake(initiator=True, identity=identities[0], expect=world.expect(1))
        shake(one, Handshake(initiator=False, identity=identities[1], expect=world.expect(0)))

    again()
    again()
    for moved in (300, -100):
        world.time[0] += moved
        with pytest.raises(HandshakeRefused) as refused:
            again()
        assert refused.value.code.startswith("result_")
        world.time[0] -= moved
    again()
    # Opted into by another end of this process: not by this one.
    simulated = world.attested(1, tier="simulated")
    body = show(simulated, STATEMENT)
    opened = world.expect(1, INSECURE_accept_simulated=True)
    peer = verify_attested(body, STATEMENT, opened, simulated.curve.public)
    with pytest.raises(HandshakeRefused):
        verify_attested(body, STATEMENT, world.expect(1), simulated.curve.public)
    with pytest.raises(HandshakeRefused) as refused:
        check_pins(peer.result, world.expect(1))
    assert refused.value.code == "simulated_refused"


@pytest.mark.threat("CHAN-15")
@pytest.mark.parametrize("replayed", [0, 1], ids=["of the initiator", "of the responder"])
def test_what_was_shown_between_the_same_two_is_of_that_session_only(world: Any, replayed: int) -> None:
    """Token, keys and static keys are the same in both sessions: only hash and exported secret tell them apart."""
    identities = [world.attested(0), world.attested(1)]

    def to_the_show() -> tuple[Handshake, Handshake, bytes]:
        one = Handshake(initiator=True, identity=identities[0], expect=world.expect(1))
        other = Handshake(initiator=False, identity=identities[1], expect=world.expect(0))
        sent = one.step(Event.SECOND, other.step(Event.FIRST, one.start()[8:])[8:])
        end = 8 + int.from_bytes(sent[4:8], "big")
        other.step(Event.THIRD, sent[8:end])
        return one, other, sent[end + 8 :]

    def shown_by_the_responder(one: Handshake, other: Handshake, shown: bytes) -> bytes:
        answer = other.step(Event.SHOW, shown)
        return one._incoming.decrypt(b"", answer[8 : 8 + int.from_bytes(answer[4:8], "big")])

    one, other, shown = to_the_show()
    older = one._shown_first if replayed == 0 else shown_by_the_responder(one, other, shown)
    one, other, shown = to_the_show()
    if replayed == 0:
        one._outgoing.nonce = 0
        target, replay = other, one._outgoing.encrypt(b"", older)
    else:
        # Encrypted as the responder would; its keys are known to the attacker here.
        target, replay = one, other._outgoing.encrypt(b"", older)
    with pytest.raises(HandshakeRefused) as refused:
        target.step(Event.SHOW, replay)
    assert refused.value.code == "signature_refused"


@pytest.mark.threat("CHAN-14")
def test_a_responder_too_refuses_its_own_static_key(world: Any) -> None:
    """The initiator is one that does not look."""
    same = world.attested(0)
    one = Handshake(initiator=True, identity=same, expect=world.expect(0))
    other = Handshake(initiator=False, identity=same, expect=world.expect(0))
    second = other.step(Event.FIRST, one.start()[8:])
    one._static = world.attested(0).curve
    sent = one.step(Event.SECOND, second[8:])
    with pytest.raises(HandshakeRefused) as refused:
        other.step(Event.THIRD, sent[8 : 8 + int.from_bytes(sent[4:8], "big")])
    assert refused.value.code == "reflected"


def test_keys_of_the_handshake_are_forgotten_when_it_is_done(world: Any, shake: Shake) -> None:
    """Chaining key and Noise keys tell everything about a session: they go before its first record."""
    one, other = world.pair()
    shake(one, other)
    for core in (one, other):
        for use in (
            core._secret.expose,
            core._noise._symmetric._chaining_key.expose,
            lambda core=core: core._noise._symmetric.cipher.encrypt(b"", b""),
            lambda core=core: core._outgoing.encrypt(b"", b""),
            lambda core=core: core._incoming.encrypt(b"", b""),
            lambda core=core: core._noise.split(),
        ):
            with pytest.raises(UsageError):
                use()
        assert core._ephemeral is core._noise._ephemeral is core._noise._lattice is None


def test_a_token_that_was_renewed_during_the_handshake_is_shown_later(
    world: Any, sides: Callable[..., Any]
) -> None:
    """In between it is asked for more than once: the newest of these must not count as shown."""
    mine = world.attested(0)
    issued = [mine.token]

    def token() -> str:
        # Every time that it is asked for there is a newer one.
        issued.append(world.renewed(mine, expires=1_800_000_290 - len(issued)))
        return issued[-1]

    one = Handshake(initiator=True, identity=evolve(mine, token=token), expect=world.expect(1))
    other = Handshake(initiator=False, identity=world.attested(1), expect=world.expect(0))
    both = sides((one, other))
    last, clock = len(issued) - 1, [1e6]
    object.__setattr__(both.one.standing._identity, "token", lambda: issued[last])
    both.one.standing.clock = lambda: clock[0]
    both.deliver(bytes(both.one.attesting() or b""), *both.records(b"x"))
    assert both.other.peer.result.expires == 1_800_000_290 - last
