"""Long sessions: tokens run out and are renewed, measurements are revoked, evidence is fresh where asked for."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from isolate.attestation.evidence import Envelope, KeyDigests, Runtime, Slot
from isolate.attestation.policy import Policy, Reference
from isolate.channel import Attested, Handshake
from isolate.channel.record import Kind
from isolate.errors import ChannelClosed, HandshakeRefused, Revoked, UsageError
from isolate.launch.root import SimulatedRoot

Make = Callable[..., Any]


def pair_with(world: Any, tokens: list[str], mine: Attested, **pins: Any) -> tuple[Handshake, Handshake]:
    """Rank 0 shows whatever is last in ``tokens``; rank 1 watches it."""
    shown = evolve(mine, token=lambda: tokens[-1])
    return (
        Handshake(initiator=True, identity=shown, expect=world.expect(1)),
        Handshake(initiator=False, identity=world.attested(1), expect=world.expect(0, **pins)),
    )


@pytest.mark.threat("CHAN-21")
def test_a_session_outlives_its_token_only_by_its_limit(world: Any, sides: Make) -> None:
    both = sides(world.pair())
    clock = [0.0]
    both.other.standing.clock = lambda: clock[0]
    both.other.standing.look()
    world.time[0] += 290 + 3599
    clock[0] += 31
    both.other.standing.look()
    world.time[0] += 10
    clock[0] += 31
    with pytest.raises(HandshakeRefused) as refused:
        both.other.standing.look()
    assert refused.value.code == "attestation_stale"


@pytest.mark.threat("CHAN-21")
def test_a_newer_token_renews_the_session(world: Any, sides: Make) -> None:
    mine = world.attested(0)
    tokens = [mine.token]
    both = sides(pair_with(world, tokens, mine, max_stale=0))
    clock = [0.0]
    for endpoint in (both.one, both.other):
        endpoint.standing.clock = lambda: clock[0]
    assert both.one.attesting() is None
    world.time[0] += 250
    tokens.append(world.renewed(mine, issued=world.time[0], expires=world.time[0] + 300))
    clock[0] += 3600.0 * 24
    record = bytes(both.one.attesting())
    assert record[0] == Kind.ATTEST
    old = both.other.peer
    assert both.deliver(record, *both.records(b"data")) == b"data"
    assert both.other.peer is not old and both.other.peer.result.expires > old.result.expires
    world.time[0] += 60
    both.other.standing.look()


RENEWALS = [
    "another instance", "more keys than before", "another record", "a stale token", "another rank", "a stranger",
]  # fmt: skip


@pytest.mark.threat("CHAN-22")
@pytest.mark.parametrize("case", RENEWALS)
def test_a_renewal_that_is_not_genuine_ends_the_session(world: Any, sides: Make, case: str) -> None:
    mine = world.attested(0)
    tokens = [mine.token]
    both = sides(pair_with(world, tokens, mine))
    standing = both.one.standing
    number = both.one._sealer.sequence
    if case == "another instance":
        standing._identity = world.attested(0)
    elif case == "more keys than before":
        # The same two keys in another set: another instance, by name.
        public = {"channel": mine.curve.public, "sign": mine.sign.verifying_key.to_bytes()}
        fewer = evolve(mine, keys=KeyDigests.of(public))
        standing._identity = evolve(fewer, token=world.renewed(fewer))
    elif case == "another record":
        number += 1
    elif case == "a stale token":
        tokens.append(world.renewed(mine, issued=1_799_999_000, expires=1_799_999_300))
    elif case == "another rank":
        tokens.append(world.renewed(mine, rank=3))
    else:
        standing._identity = evolve(mine, token="e.e.e")
    body = standing.again(number, now=True)
    with pytest.raises(HandshakeRefused):
        both.deliver(bytes(both.one._seal(Kind.ATTEST, memoryview(body))))


def test_a_client_renews_nothing(world: Any, sides: Make) -> None:
    both = sides(world.client_pair())
    assert both.one.attesting(now=True) is None
    with pytest.raises(HandshakeRefused):
        both.deliver(bytes(both.one._seal(Kind.ATTEST, memoryview(b"x"))))


@pytest.mark.threat("CHAN-23")
@pytest.mark.parametrize("what", ["send", "recv", "recv_into"])
def test_a_revoked_measurement_ends_live_sessions(world: Any, together: Any, what: str) -> None:
    """recheck is asked at most every recheck_every seconds, before anything goes out and before it is delivered."""
    import socket

    from isolate.channel import Channel
    from isolate.channel.streams import SocketWire

    revoked = []

    def recheck(peer: Any) -> None:
        assert peer.result.slot.rank == 0
        if revoked:
            raise Revoked("this measurement was revoked")

    cores = (
        Handshake(initiator=True, identity=world.attested(0), expect=world.expect(1)),
        Handshake(
            initiator=False,
            identity=world.attested(1),
            expect=world.expect(0, recheck=recheck, recheck_every=0),
        ),
    )
    wires = [SocketWire(end, 5.0) for end in socket.socketpair()]
    sessions = together(lambda: wires[0].handshake(cores[0]), lambda: wires[1].handshake(cores[1]))
    one, other = (Channel(wire, session) for wire, session in zip(wires, sessions, strict=True))
    one.send(b"x")
    assert other.recv() == b"x"
    one.send(b"secret")
    revoked.append(True)
    buffer = bytearray(6)
    uses: dict[str, Callable[[], Any]] = {
        "send": lambda: other.send(b"more"),
        "recv": other.recv,
        "recv_into": lambda: other.recv_into(buffer),
    }
    with pytest.raises(HandshakeRefused) as refused:
        uses[what]()
    assert refused.value.code == "revoked" and not any(buffer)
    with pytest.raises(ChannelClosed, match="revoked"):
        one.recv()
    with pytest.raises(ChannelClosed):
        other.send(b"x")


def test_reattest_by_hand(world: Any, together: Any) -> None:
    import socket

    from isolate.channel import Channel
    from isolate.channel.streams import SocketWire

    mine = world.attested(0)
    cores = pair_with(world, [mine.token], mine)
    wires = [SocketWire(end, 5.0) for end in socket.socketpair()]
    sessions = together(lambda: wires[0].handshake(cores[0]), lambda: wires[1].handshake(cores[1]))
    one, other = (Channel(wire, session) for wire, session in zip(wires, sessions, strict=True))
    before = other.peer
    one.reattest()
    one.send(b"x")
    assert other.recv() == b"x" and other.peer is not before
    one.close()
    other.close()


@pytest.fixture
def platform() -> tuple[SimulatedRoot, Policy, Callable[..., Callable[[bytes], bytes]]]:
    root = SimulatedRoot.generate()
    registers = {0: b"a" * 48, 1: b"b" * 48, 2: b"c" * 48}
    policy = Policy(
        lineage="acme/train",
        sequence=7,
        references=(Reference("train", "simulated", {"PCR0": registers[0]}),),
        simulated_anchors=(root.fingerprint,),
        INSECURE_accept_simulated=True,
    )

    def attester(keys: KeyDigests, rank: int, **changes: Any) -> Callable[[bytes], bytes]:
        def evidence(nonce: bytes) -> bytes:
            fields = {"nonce": nonce, "keys_digest": keys.digest, "slot": Slot("job", rank, 1), **changes}
            pcrs = {**registers, **fields.pop("pcrs", {})}
            runtime = Runtime(kind="simulated", purpose="train", **fields)
            document = root.module("m").document(pcrs, runtime.binding(), fields["nonce"])
            return Envelope("simulated", document, (), runtime).encode()

        return evidence

    return root, policy, attester


@pytest.mark.threat("CHAN-24")
@pytest.mark.parametrize(
    "case", ["genuine", "none", "another nonce", "another measurement", "other keys", "another slot", "garbage"]
)
@pytest.mark.parametrize("asks", ["initiator", "responder"])
def test_fresh_evidence_where_the_policy_asks(world: Any, shake: Any, platform: Any, case: str, asks: str) -> None:
    """The token is good in every case; the evidence is appraised for this session, on either side."""
    root, policy, attester = platform
    world.time[0] = root.now()
    shower, watcher = (1, 0) if asks == "initiator" else (0, 1)
    plain = world.attested(shower, issued=world.time[0], expires=world.time[0] + 300)
    changes: dict[str, Any] = {
        "another nonce": {"nonce": secrets.token_bytes(32)},
        "another measurement": {"pcrs": {0: b"z" * 48}},
        "other keys": {"keys_digest": bytes(32)},
        "another slot": {"slot": Slot("job", 9, 1)},
    }.get(case, {})
    make = attester(plain.keys, shower, **changes)
    evidence = {"none": None, "garbage": lambda nonce: b"garbage"}.get(case, make)
    identities = {
        shower: evolve(plain, evidence=evidence),
        watcher: world.attested(watcher, issued=world.time[0], expires=world.time[0] + 300),
    }
    expects = {watcher: world.expect(shower, policy=policy), shower: world.expect(watcher)}
    one = Handshake(initiator=True, identity=identities[0], expect=expects[0])
    other = Handshake(initiator=False, identity=identities[1], expect=expects[1])
    if case == "genuine":
        shake(one, other)
        assert one.done and other.done
        return
    with pytest.raises(HandshakeRefused):
        shake(one, other)
    assert not one.done or not other.done


def test_a_token_is_a_string_or_asked_for(world: Any) -> None:
    mine = world.attested(0)
    assert evolve(mine, token=lambda: "later").current() == "later"
    with pytest.raises(UsageError):
        evolve(mine, static=world.attested(1).static)
