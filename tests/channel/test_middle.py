"""A man in the middle of real sockets, at every frame of a conversation: handshake, records, rekeying, the close.

He sees every frame, and does one thing to one of them. Whatever that is: nobody gets a byte that the right peer did
not send to him, in its order; who fails has an error of ours; nobody waits longer than his timeout.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
from attrs import define, field

from isolate.channel import Channel, Handshake, RekeyLimits, aio
from isolate.channel.record import Kind
from isolate.channel.streams import SocketWire
from isolate.crypto.aead import Suite
from isolate.errors import ChannelClosed, ChannelError

CANARIES = [b"the canary of the initiator " * 9, b"the canary of the responder " * 9]
LONG = b"a long message in the clear " * 40_000  # more than one record
SENT = {0: [CANARIES[0], LONG], 1: [CANARIES[1]]}  # by direction: 0 from the initiator, 1 from the responder
TAG = Suite.AES_256_GCM.tag_size
# The frames of the conversation below, by direction.
FRAMES = {
    0: ["FIRST", "THIRD", "SHOW", "FIN", "DATA", "ATTEST", "REKEY", "LONG", "PART", "PART", "CLOSE"],
    1: ["SECOND", "SHOW", "FIN", "DATA"],
}
ATTACKS = [
    "drop", "repeat", "reorder", "reflect", "splice", "flip", "truncate", "extend", "relay", "retype", "resize",
    "cut",
]  # fmt: skip
# After these somebody may wait for what never comes, to the end of his patience.
SILENCE = ["drop", "reorder", "flip", "truncate", "resize"]


def split(data: bytearray) -> bytes | None:
    """The first whole frame in ``data``, taken out of it."""
    if len(data) < 8:
        return None
    kind, size = struct.unpack(">B3xI", data[:8])
    end = 8 + size + (TAG if kind >= Kind.FIN else 0)
    if len(data) < end:
        return None
    taken = bytes(data[:end])
    del data[:end]
    return taken


@define
class Middle:
    """Passes frames on between two sockets. ``attack`` is done to frame ``place`` of one direction."""

    ends: list[socket.socket]
    attack: str = ""
    direction: int = -1
    place: int = -1
    foreign: list[list[bytes]] = field(factory=lambda: [[], []])
    draw: random.Random = field(factory=lambda: random.Random(0))
    seen: list[list[bytes]] = field(factory=lambda: [[], []])
    held: bytes = b""

    def start(self) -> list[threading.Thread]:
        threads = [threading.Thread(target=self.work, args=(one,), daemon=True) for one in (0, 1)]
        for thread in threads:
            thread.start()
        return threads

    def work(self, direction: int) -> None:
        source, target = self.ends[direction], self.ends[1 - direction]
        data = bytearray()
        try:
            while some := source.recv(1 << 20):
                data += some
                while (frame := split(data)) is not None:
                    self.seen[direction].append(frame)
                    for where, what in self.done_to(direction, frame):
                        {"on": target, "back": source}[where].sendall(what)
                    if self.attack == "cut" and self.is_at(direction):
                        target.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        for one in self.ends:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def is_at(self, direction: int) -> bool:
        return direction == self.direction and len(self.seen[direction]) - 1 == self.place

    def done_to(self, direction: int, frame: bytes) -> list[tuple[str, bytes]]:
        if direction == self.direction and self.held:
            held, self.held = self.held, b""
            return [("on", frame), ("on", held)]
        if not self.is_at(direction):
            return [("on", frame)]
        place = self.draw.randrange(len(frame))
        other, old = self.foreign[direction][self.place], int.from_bytes(frame[4:8], "big")
        if self.attack == "reorder":
            self.held = frame
            return []
        bent = frame[:place] + bytes([frame[place] ^ (1 << self.draw.randrange(8))]) + frame[place + 1 :]
        kind = self.draw.choice([one for one in (1, 2, 3, 4, 6, *Kind, 0, 5, 99) if one != frame[0]])
        size = self.draw.choice([one for one in (0, 1, 5000, 1 << 20, (1 << 20) + 1, 2**32 - 1) if one != old])
        spliced = frame[: max(place, 9)] + other[max(place, 9) :]
        done: dict[str, list[tuple[str, bytes]]] = {
            "drop": [],
            "cut": [("on", frame[:place])],
            "repeat": [("on", frame), ("on", frame)],
            "reflect": [("back", frame)],
            "splice": [("on", bent if spliced == frame else spliced)],
            "flip": [("on", bent)],
            "truncate": [("on", frame[:place])],
            "extend": [("on", frame + self.draw.randbytes(self.draw.randrange(1, 99)))],
            "relay": [("on", other)],
            "retype": [("on", bytes([kind]) + frame[1:])],
            "resize": [("on", frame[:4] + struct.pack(">I", size) + frame[8:])],
        }
        return done[self.attack]


def blocking(end: socket.socket, core: Handshake, timeout: float, got: list[bytes]) -> None:
    wire = SocketWire(end, timeout)
    with Channel(wire, wire.handshake(core)) as channel:
        if core.initiator:
            channel.send(CANARIES[0])
            channel.reattest()
            got.append(bytes(channel.recv()))
            channel.send(LONG)
            return
        got.append(bytes(channel.recv()))
        channel.send(CANARIES[1])
        got.append(bytes(channel.recv()))
        with pytest.raises(ChannelClosed):
            channel.recv()


async def awaiting(end: socket.socket, core: Handshake, timeout: float, got: list[bytes]) -> None:
    wire = aio._Wire(end, timeout)
    try:
        async with aio.Channel(wire, await wire.handshake(core)) as channel:
            if core.initiator:
                await channel.send(CANARIES[0])
                await channel.reattest()
                got.append(bytes(await channel.recv()))
                await channel.send(LONG)
                return
            got.append(bytes(await channel.recv()))
            await channel.send(CANARIES[1])
            got.append(bytes(await channel.recv()))
            with pytest.raises(ChannelClosed):
                await channel.recv()
    finally:
        end.close()


def converse(world: Any, ours: Any, timeout: float, **attack: Any) -> tuple[Middle, list[Any], list[list[bytes]]]:
    """The whole conversation; each end's error (or None), and what it received."""
    pairs = [socket.socketpair(), socket.socketpair()]
    middle = Middle([pairs[0][1], pairs[1][1]], **attack)
    limits = {"rekey": RekeyLimits(records=4), "suites": [Suite.AES_256_GCM]}
    cores = [
        Handshake(initiator=True, identity=ours[0], expect=world.expect(1), **limits),
        Handshake(initiator=False, identity=ours[1], expect=world.expect(0), **limits),
    ]
    failed: list[Any] = [None, None]
    got: list[list[bytes]] = [[], []]

    def run(one: int, talk: Callable[..., Any]) -> None:
        end = pairs[one][0]
        try:
            if talk is awaiting:
                asyncio.run(awaiting(end, cores[one], timeout, got[one]))
            else:
                talk(end, cores[one], timeout, got[one])
        except BaseException as error:
            failed[one] = error
        finally:
            end.close()

    # The blocking end and the awaiting one change places with the direction that is attacked.
    talks = [blocking, awaiting] if middle.direction else [awaiting, blocking]
    threads = [threading.Thread(target=run, args=(one, talks[one]), daemon=True) for one in (0, 1)]
    passing = middle.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(10 * timeout, 10))
        assert not thread.is_alive(), "hangs"
    for _, end in pairs:
        end.close()
    for thread in passing:
        thread.join(5)
    return middle, failed, got


def attacked(world: Any, attack: str, direction: int, place: int, seed: int) -> None:
    ours = [world.attested(0), world.attested(1)]
    names = {kind.value: kind.name for kind in Kind} | {1: "FIRST", 2: "SECOND", 3: "THIRD", 4: "SHOW"}
    # Another conversation of the very same two: what he relays and splices from.
    earlier, failed, got = converse(world, ours, 10.0)
    assert failed == [None, None] and got == [SENT[1], SENT[0]]
    assert {one: [names[frame[0]] for frame in earlier.seen[one]] for one in (0, 1)} == FRAMES
    middle, failed, got = converse(
        world,
        ours,
        1.0 if attack in SILENCE else 10.0,
        attack=attack,
        direction=direction,
        place=place,
        foreign=earlier.seen,
        draw=random.Random(f"{attack} {direction} {place} {seed}"),
    )
    assert len(middle.seen[direction]) > place, "he never saw that frame"
    for error in failed:
        assert error is None or isinstance(error, ChannelError), repr(error)
    for one, received in enumerate(got):
        assert received == SENT[1 - one][: len(received)]
    # What comes after the last frame that somebody reads is read by nobody.
    unread = attack in ("repeat", "extend") and place == len(FRAMES[direction]) - 1
    assert failed != [None, None] or unread
    everything = b"".join(middle.seen[0] + middle.seen[1])
    assert not any(secret[:28] in everything for secret in (*CANARIES, LONG))


EVERYWHERE = [(direction, place) for direction in (0, 1) for place in range(len(FRAMES[direction]))]
NAMES = [f"{'<-' if direction else '->'}{FRAMES[direction][place]}{place}" for direction, place in EVERYWHERE]


@pytest.mark.threat("CHAN-13")
@pytest.mark.threat("CHAN-18")
@pytest.mark.parametrize("attack", ["flip", "relay", "reflect", "retype"])
@pytest.mark.parametrize(("direction", "place"), EVERYWHERE[::3], ids=NAMES[::3])
def test_one_attack_on_a_frame_of_a_conversation(world: Any, attack: str, direction: int, place: int) -> None:
    attacked(world, attack, direction, place, 0)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("direction", "place"), EVERYWHERE, ids=NAMES)
def test_every_attack_on_every_frame_of_a_conversation(world: Any, attack: str, direction: int, place: int) -> None:
    attacked(world, attack, direction, place, 1)


def test_the_conversation_goes_through_a_middle_that_does_nothing(world: Any) -> None:
    """And the identity of neither end is in what passes."""
    ours = [world.attested(0), world.attested(1)]
    middle, failed, got = converse(world, ours, 10.0)
    assert failed == [None, None] and got == [SENT[1], SENT[0]]
    everything = b"".join(middle.seen[0] + middle.seen[1])
    for one in ours:
        assert one.token[:40].encode() not in everything and one.curve.public not in everything
