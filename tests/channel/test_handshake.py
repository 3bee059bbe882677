"""The handshake in memory: every state with every event, every pin, both profiles, and whoever sits between."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from isolate.attestation.evidence import instance_id
from isolate.channel import AttestedPeer, Expect, Handshake, Holder, HolderPeer, Session
from isolate.channel.handshake import MAX_FRAME, TABLE, Event, State, Terms, frame, refusal
from isolate.channel.record import HEADER
from isolate.crypto.aead import Suite
from isolate.crypto.signing import SigningKey
from isolate.errors import ChannelClosed, HandshakeRefused, IsolateError, UsageError

Shake = Callable[..., None]
STEPS = ["FIRST", "SECOND", "THIRD", "SHOW", "SHOW", "FIN", "FIN"]  # frames in the order in which they travel


def test_both_sides_end_with_the_same_session(world: Any, shake: Shake) -> None:
    one, other = world.pair(purpose="gradients")
    shake(one, other)
    ours, theirs = one.session, other.session
    assert ours.binding == theirs.binding and len(ours.binding) == 32
    assert ours.peer.result.slot.rank == 1 and theirs.peer.result.slot.rank == 0
    again, _ = world.pair(purpose="gradients")
    assert isinstance(ours.peer, AttestedPeer)
    with pytest.raises(UsageError):
        _ = again.session


def test_a_client_shows_its_holder_key(world: Any, shake: Shake) -> None:
    key = SigningKey.generate()
    one, other = world.client_pair(key)
    shake(one, other)
    assert isinstance(other.session.peer, HolderPeer)
    assert other.session.peer.public == key.verifying_key.ed25519
    assert one.session.peer.result.slot.rank == 1


@pytest.mark.threat("CHAN-8")
def test_nobody_else_makes_a_session_or_a_peer() -> None:
    for make in (
        lambda: Session(object(), *[None] * 5),  # type: ignore[arg-type]
        lambda: AttestedPeer(object(), *[None] * 3),  # type: ignore[arg-type]
        lambda: HolderPeer(object(), bytes(32)),
    ):
        with pytest.raises(UsageError):
            make()


def in_state(world: Any, wanted: State) -> tuple[Handshake, dict[Event, bytes]]:
    """A handshake in this state, and the genuine bodies of every frame of its session so far."""
    one, other = world.pair()
    bodies: dict[Event, bytes] = {}
    if wanted in (one.state, other.state):
        return (one if one.state is wanted else other), bodies
    queue = [(other, one, one.start())]
    while queue:
        if wanted in (one.state, other.state):
            return (one if one.state is wanted else other), bodies
        target, source, data = queue.pop(0)
        while data:
            event, size = target.parse(data[:8])
            end = 8 + target.body_size(event, size)
            bodies[event] = data[8:end]
            answer = target.step(event, data[8:end])
            data = data[end:]
            if wanted in (one.state, other.state):
                return (one if one.state is wanted else other), bodies
            if answer:
                queue.append((source, target, answer))
    raise AssertionError(f"no handshake passes {wanted}")


@pytest.mark.threat("CHAN-9")
@pytest.mark.parametrize("event", list(Event), ids=lambda event: event.name)
@pytest.mark.parametrize("state", [state for state in State if state is not State.ENDED], ids=lambda one: one.name)
def test_every_state_with_every_event(world: Any, state: State, event: Event) -> None:
    """What is not in the table is refused, ends the handshake, and yields no session and no byte to send."""
    core, bodies = in_state(world, state)
    genuine = bodies.get(event, b"")
    expected = TABLE.get((state, event))
    for body in (genuine, b"", bytes(1300)):
        try:
            core.step(event, body)
        except HandshakeRefused:
            assert core.state is State.ENDED
        else:
            assert expected is not None and core.state is expected[0]
            core, _ = in_state(world, state)
            continue
        with pytest.raises(UsageError):
            _ = core.session
        # An end is an end: the genuine frame comes too late.
        for late in Event:
            with pytest.raises(HandshakeRefused):
                core.step(late, bodies.get(late, b""))
        core, _ = in_state(world, state)


def test_the_table_is_the_whole_protocol() -> None:
    assert len(TABLE) == 8
    assert {after for after, _ in TABLE.values()} == set(State) - {State.IDLE, State.WAIT_FIRST, State.ENDED}
    assert all(hasattr(Handshake, name) for _, name in TABLE.values())


PINS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("another job", {"job": "other"}, {}, "wrong_job"),
    ("no slot", {"job": None}, {}, "wrong_job"),
    ("another rank", {"rank": 3}, {}, "wrong_rank"),
    ("another lineage", {"lineage": "evil/train"}, {}, "wrong_lineage"),
    ("an older policy", {"sequence": 6}, {"least_sequence": 7}, "old_policy"),
    ("an expired token", {"issued": 1_799_999_000, "expires": 1_799_999_300}, {}, "result_expired"),
    ("a simulated platform", {"tier": "simulated"}, {}, "result_simulated"),
    ("another instance", {}, {"instance": bytes(32)}, "wrong_instance"),
    ("another issuer", {"issuer": SigningKey.generate()}, {}, "result_signature"),
]


@pytest.mark.threat("CHAN-10")
@pytest.mark.parametrize(("claims", "pins", "code"), [row[1:] for row in PINS], ids=[row[0] for row in PINS])
@pytest.mark.parametrize("wrong", ["initiator", "responder"])
def test_every_pin_refuses_on_either_side(
    world: Any, shake: Shake, claims: dict[str, Any], pins: dict[str, Any], code: str, wrong: str
) -> None:
    bad, good = (0, 1) if wrong == "initiator" else (1, 0)
    identities = {bad: world.attested(**{"rank": bad, **claims}), good: world.attested(good)}
    # Terms that both must name (the lineage is one) are the honest ones; the claims of the token are not.
    expects = {bad: world.expect(good), good: world.expect(bad, **pins)}
    one = Handshake(initiator=True, identity=identities[0], expect=expects[0])
    other = Handshake(initiator=False, identity=identities[1], expect=expects[1])
    with pytest.raises(HandshakeRefused) as refused:
        shake(one, other)
    assert refused.value.code == code
    assert not (one if good == 0 else other).done


def test_a_simulated_peer_passes_when_it_is_opted_into(world: Any, shake: Shake) -> None:
    pins = {"INSECURE_accept_simulated": True}
    one = Handshake(initiator=True, identity=world.attested(0, tier="simulated"), expect=world.expect(1, **pins))
    other = Handshake(initiator=False, identity=world.attested(1, tier="simulated"), expect=world.expect(0, **pins))
    shake(one, other)
    assert one.session.peer.result.tier == "simulated"


@pytest.mark.threat("CHAN-11")
@pytest.mark.parametrize("what", ["purpose", "job", "group", "lineage", "suite", "profile", "version"])
def test_what_both_must_agree_on(world: Any, shake: Shake, what: str) -> None:
    """Purpose, job, group and policy are in the prologue (the last three under a commitment), so are the modes."""
    one, other = world.pair()
    if what == "purpose":
        one = Handshake(initiator=True, identity=world.attested(0), expect=world.expect(1), purpose="x")
    elif what in ("job", "group", "lineage"):
        pins = world.expect(1, **{what: "x"})
        one = Handshake(initiator=True, identity=world.attested(0), expect=pins)
    elif what == "suite":
        other = Handshake(
            initiator=False, identity=world.attested(1), expect=world.expect(0), suites=[Suite.AES_256_GCM]
        )
        one = Handshake(
            initiator=True, identity=world.attested(0), expect=world.expect(1), suites=[Suite.AEGIS_256]
        )
    elif what == "profile":
        one, _ = world.client_pair()

    def between(number: int, header: bytes, body: bytes) -> list[tuple[bytes, bytes]]:
        if what == "version" and number == 0:
            body = body[:4] + b"\x02" + body[5:]
        return [(header, body)]

    with pytest.raises(HandshakeRefused):
        shake(one, other, between)
    assert not one.done and not other.done


@pytest.mark.threat("CHAN-12")
@pytest.mark.parametrize("place", [4, 5, 6, 7, 8, 39])
def test_the_hello_cannot_be_bent(world: Any, shake: Shake, place: int) -> None:
    """Suite and profile are asked for in the clear: a change of any byte is a refusal, never a weaker channel."""
    for value in range(4):
        one, other = world.pair()
        travelled = []

        def between(
            number: int, header: bytes, body: bytes, value: int = value, travelled: list[int] = travelled
        ) -> list[tuple[bytes, bytes]]:
            travelled.append(number)
            if number == 0:
                body = body[:place] + bytes([body[place] ^ (value + 1)]) + body[place + 1 :]
            return [(header, body)]

        with pytest.raises(HandshakeRefused):
            shake(one, other, between)
        assert not one.done and not other.done
        # Noticed by the transcript itself, before anything is shown.
        assert len(travelled) <= 2


def test_terms_other_than_committed_are_refused(world: Any, shake: Shake) -> None:
    one, other = world.pair()

    def between(number: int, header: bytes, body: bytes) -> list[tuple[bytes, bytes]]:
        if number == 0:
            one._terms = Terms(bytes(32), "job", "", 1, "acme/train", 0, False).encode()
        return [(header, body)]

    with pytest.raises(HandshakeRefused) as refused:
        shake(one, other, between)
    assert refused.value.code == "wrong_terms"


def test_a_peer_end_takes_no_client_and_misfits_are_told(world: Any, shake: Shake) -> None:
    holder, _ = world.client_pair()
    other = world.pair()[1]
    with pytest.raises(HandshakeRefused, match="profile"):
        shake(holder, other)
    key = Holder(SigningKey.generate())
    for misfit in (
        {"initiator": True, "identity": key, "expect": world.expect(1), "profile": "peer"},
        {"initiator": False, "identity": key, "expect": world.expect(1), "profile": "client"},
        {"initiator": True, "identity": world.attested(0), "expect": world.expect(1), "profile": "client"},
        {"initiator": True, "identity": world.attested(0), "expect": None},
        {"initiator": False, "identity": world.attested(0), "expect": None},
        {"initiator": True, "identity": world.attested(0), "expect": world.expect(1), "profile": "other"},
        {"initiator": True, "identity": world.attested(0), "expect": world.expect(1), "purpose": "x" * 200},
    ):
        with pytest.raises(UsageError):
            Handshake(**misfit)
    with pytest.raises(UsageError):
        Expect(job="j", issuer_key=b"short", clock=lambda: 0)
    attested = world.attested(0)
    with pytest.raises(UsageError):
        evolve(attested, sign=SigningKey.generate())


def test_a_refusal_tells_a_code_and_nothing_else(world: Any) -> None:
    told = refusal(HandshakeRefused("a long story about the peer", code="wrong_rank"))
    assert told[8:] == b"wrong_rank" and b"story" not in told
    one, _ = world.pair()
    one.start()
    with pytest.raises(HandshakeRefused) as refused:
        one.step(Event.REFUSE, b"\x1b[31mhostile\n" + bytes(100))
    assert refused.value.code == "peer_refused" and "hostile" not in str(refused.value)


@pytest.mark.parametrize("header", [HEADER.pack(99, 0, 0, 1), HEADER.pack(1, 1, 0, 1), HEADER.pack(0, 0, 0, 1),
                                    HEADER.pack(1, 0, 0, MAX_FRAME + 1), HEADER.pack(16, 0, 0, 1)])  # fmt: skip
def test_frames_that_are_none(header: bytes) -> None:
    with pytest.raises(HandshakeRefused):
        Handshake.parse(header)


# Whoever sits between.


def bent(kind: str, draw: random.Random, seen: list[tuple[bytes, bytes]], header: bytes, body: bytes) -> Any:
    """What the man in the middle delivers instead of one frame."""
    place = draw.randrange(len(body)) if body else 0
    if kind == "drop":
        return []
    if kind == "repeat":
        return [(header, body), (header, body)]
    if kind == "flip":
        changed = body[:place] + bytes([body[place] ^ (1 << draw.randrange(8))]) + body[place + 1 :]
        return [(header, changed)]
    if kind == "truncate":
        return [(header, body[:place])]
    if kind == "extend":
        return [(header, body + draw.randbytes(draw.randrange(1, 40)))]
    if kind == "splice":
        other = draw.choice(seen)
        return [(header, body[:place] + other[1][place:])]
    if kind == "replay":
        return [draw.choice(seen)]
    if kind == "noise":
        return [(header, draw.randbytes(len(body)))]
    if kind == "retype":
        event = draw.choice([one for one in Event if one not in (Event.START, header[0])])
        return [(HEADER.pack(event, 0, 0, len(body)), body)]
    return [draw.choice(seen), (header, body)]


ATTACKS = ["drop", "repeat", "flip", "truncate", "extend", "splice", "replay", "noise", "retype", "insert"]


def same_two(world: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Handshakes of the peer and of the client profile: each time between the same two."""
    one, other, holder = world.attested(0), world.attested(1), Holder(SigningKey.generate())

    def peers() -> tuple[Handshake, Handshake]:
        return (
            Handshake(initiator=True, identity=one, expect=world.expect(1)),
            Handshake(initiator=False, identity=other, expect=world.expect(0)),
        )

    def client() -> tuple[Handshake, Handshake]:
        return (
            Handshake(initiator=True, identity=holder, expect=world.expect(1), profile="client"),
            Handshake(initiator=False, identity=other, expect=None, profile="client"),
        )

    return peers, client


def recorded(shake: Shake, pair: Callable[[], Any]) -> list[tuple[bytes, bytes]]:
    """Frames of another session between the same two, for splicing and replay."""
    seen: list[tuple[bytes, bytes]] = []
    shake(*pair(), lambda number, header, body: seen.append((header, body)) or [(header, body)])
    return seen


def attack(
    shake: Shake, kind: str, turn: int, draw: random.Random, pair: Callable[[], Any], old: list[tuple[bytes, bytes]]
) -> None:
    """One handshake with one attack at one frame: both may finish only if nothing was changed in effect."""
    seen = list(old)
    one, other = pair()
    touched = []

    def between(number: int, header: bytes, body: bytes) -> list[tuple[bytes, bytes]]:
        seen.append((header, body))
        if number != turn:
            return [(header, body)]
        delivered = bent(kind, draw, seen[:-1], header, body)
        touched.append(delivered != [(header, body)])
        return delivered

    refused = False
    try:
        shake(one, other, between)
    except HandshakeRefused:
        refused = True
    if touched and touched[0]:
        # A repeated last frame comes after the end: it is no record, and ends the channel there.
        late = kind in ("repeat", "insert") and turn == len(STEPS) - 1
        assert refused or kind == "drop" or late
        assert not (one.done and other.done) or late


@pytest.mark.threat("CHAN-13")
@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("turn", range(len(STEPS)), ids=[f"{n}-{step}" for n, step in enumerate(STEPS)])
def test_a_man_in_the_middle_gets_nothing(world: Any, shake: Shake, kind: str, turn: int) -> None:
    for pair in same_two(world):
        old = recorded(shake, pair)
        for seed in range(4):
            attack(shake, kind, turn, random.Random(f"{kind} {turn} {seed}"), pair, old)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_a_man_in_the_middle_gets_nothing_for_many_seeds(world: Any, shake: Shake, seed: int) -> None:
    draw = random.Random(seed)
    peers, _ = same_two(world)
    attack(shake, draw.choice(ATTACKS), draw.randrange(len(STEPS)), draw, peers, recorded(shake, peers))


@pytest.mark.threat("CHAN-14")
def test_reflection_is_refused(world: Any) -> None:
    """Everything that an end sends comes back to it, or to a second end with the same keys."""
    one, _ = world.pair()
    first = one.start()
    with pytest.raises(HandshakeRefused):
        one.step(Event.FIRST, first[8:])
    same = world.attested(0)
    initiator = Handshake(initiator=True, identity=same, expect=world.expect(0))
    responder = Handshake(initiator=False, identity=same, expect=world.expect(0))
    second = responder.step(Event.FIRST, initiator.start()[8:])
    with pytest.raises(HandshakeRefused, match="our own"):
        initiator.step(Event.SECOND, second[8:])


@pytest.mark.threat("CHAN-15")
def test_relay_between_two_sessions_is_refused(world: Any) -> None:
    """A relay shakes hands with each side by itself, and passes on what each shows, which is bound elsewhere."""
    victim, target = world.pair()
    mallory = world.attested(5)
    to_victim = Handshake(initiator=False, identity=mallory, expect=world.expect(0))
    to_target = Handshake(initiator=True, identity=mallory, expect=world.expect(1))
    third_and_show = victim.step(Event.SECOND, to_victim.step(Event.FIRST, victim.start()[8:])[8:])
    size = 8 + int.from_bytes(third_and_show[4:8], "big")
    to_victim.step(Event.THIRD, third_and_show[8:size])
    shown_by_victim = to_victim._incoming.decrypt(b"", third_and_show[size + 8 :])
    sent = to_target.step(Event.SECOND, target.step(Event.FIRST, to_target.start()[8:])[8:])
    size = 8 + int.from_bytes(sent[4:8], "big")
    target.step(Event.THIRD, sent[8:size])
    # Instead of its own: what the victim showed, whole and genuine, under the relay's session with the target.
    to_target._outgoing.nonce = 0
    with pytest.raises(HandshakeRefused) as refused:
        target.step(Event.SHOW, to_target._outgoing.encrypt(b"", shown_by_victim))
    assert refused.value.code == "key_not_attested"


@pytest.mark.threat("CHAN-16")
def test_stolen_token_without_the_signing_key_is_refused(world: Any, shake: Shake) -> None:
    """The static key too was stolen, so that Noise itself is satisfied; the signing key was not."""
    honest = world.attested(0)
    thief = world.attested(0)
    forged = evolve(honest)
    object.__setattr__(forged, "sign", thief.sign)
    one = Handshake(initiator=True, identity=forged, expect=world.expect(1))
    other = Handshake(initiator=False, identity=world.attested(1), expect=world.expect(0))
    with pytest.raises(HandshakeRefused) as refused:
        shake(one, other)
    assert refused.value.code == "key_not_attested"


class Impostor:
    """Shows somebody's verifying key, and signs with another."""

    def __init__(self, shown: SigningKey) -> None:
        self.verifying_key = shown.verifying_key
        self.sign = SigningKey.generate().sign


@pytest.mark.threat("CHAN-16")
@pytest.mark.parametrize("profile", ["peer", "client"])
def test_the_key_that_is_shown_must_sign(world: Any, shake: Shake, profile: str) -> None:
    """Token, keys and static key are genuine; the signature is somebody else's."""
    if profile == "peer":
        identity = world.attested(0)
        object.__setattr__(identity, "sign", Impostor(identity.sign))
        one, other = Handshake(initiator=True, identity=identity, expect=world.expect(1)), world.pair()[1]
    else:
        one, other = world.client_pair(Impostor(SigningKey.generate()))
    with pytest.raises(HandshakeRefused) as refused:
        shake(one, other)
    assert refused.value.code == {"peer": "signature_refused", "client": "holder_refused"}[profile]


@pytest.mark.threat("CHAN-15")
def test_what_was_shown_in_an_older_session_is_refused(world: Any, shake: Shake) -> None:
    """The static key was stolen, and a SHOW of an older session was seen in the clear: still not this session."""
    identity = world.attested(0)
    options = {"initiator": True, "identity": identity, "expect": world.expect(1)}
    older = Handshake(**options)
    shake(older, world.pair()[1])
    replay, target = Handshake(**options), world.pair()[1]

    def between(number: int, header: bytes, body: bytes) -> list[tuple[bytes, bytes]]:
        if number == 3:
            replay._outgoing.nonce = 0
            body = replay._outgoing.encrypt(b"", older._shown_first)
            header = HEADER.pack(Event.SHOW, 0, 0, len(body))
        return [(header, body)]

    with pytest.raises(HandshakeRefused) as refused:
        shake(replay, target, between)
    assert refused.value.code == "signature_refused"


@pytest.mark.threat("CHAN-17")
def test_no_application_byte_before_both_fins(world: Any) -> None:
    """A responder that verified its peer has no session until the initiator's FIN; before it every record fails."""
    one, other = world.pair()
    second = other.step(Event.FIRST, one.start()[8:])
    sent = one.step(Event.SECOND, second[8:])
    size = 8 + int.from_bytes(sent[4:8], "big")
    other.step(Event.THIRD, sent[8:size])
    other.step(Event.SHOW, sent[size + 8 :])
    with pytest.raises(UsageError):
        _ = other.session
    with pytest.raises(HandshakeRefused):
        Handshake.parse(HEADER.pack(16, 0, 0, 5))


def test_instances_are_named_by_their_keys(world: Any, shake: Shake) -> None:
    identity = world.attested(1)
    pins = world.expect(1, instance=instance_id(identity.keys.digest))
    one = Handshake(initiator=True, identity=world.attested(0), expect=pins)
    other = Handshake(initiator=False, identity=identity, expect=world.expect(0))
    shake(one, other)
    assert one.session.peer.result.instance == pins.instance


def test_a_forked_handshake_is_over(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = world.pair()
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(HandshakeRefused, match="forked"):
        one.start()


def test_errors_are_in_the_tree() -> None:
    assert issubclass(HandshakeRefused, IsolateError) and issubclass(ChannelClosed, IsolateError)
    assert frame(Event.FIRST, b"x") == b"\x01\0\0\0\0\0\0\x01x"
