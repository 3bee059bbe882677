"""Records without a transport: order, limits, rekeying, ends, and whoever bends them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from isolate.channel import Channel, RekeyLimits
from isolate.channel.record import HEADER, PART_SIZE, Kind, Opener, Sealer, hard_limits
from isolate.channel.session import MAX_MESSAGE
from isolate.channel.streams import SocketWire
from isolate.crypto.aead import Pin, Suite
from isolate.crypto.secret import Secret
from isolate.errors import ChannelClosed, ChannelError, RecordRefused, UsageError

Make = Callable[..., Any]
SUITES = list(Suite)


@pytest.mark.parametrize("suite", SUITES)
def test_a_record_is_what_the_specification_says(suite: Suite) -> None:
    """Built again here from the primitive: header, nonce, associated data (docs/spec/channel.md, 5)."""
    from isolate.crypto.aead import Cipher

    key = Secret(bytes(range(32)))
    sealer = Sealer(suite, key)
    sealer.seal(Kind.FIN)
    record = bytes(sealer.seal(Kind.DATA, memoryview(b"hello")))
    header = bytes([16, 0, 0, 0, 0, 0, 0, 5])
    nonce = (1).to_bytes(suite.nonce_size, "big")
    assert record == header + Cipher(suite, key).seal(b"hello", nonce, header)


@pytest.mark.threat("CHAN-18")
@pytest.mark.parametrize("attack", ["drop", "repeat", "swap", "flip", "truncate", "splice", "reflect", "forge"])
def test_records_come_once_in_order_and_whole(sides: Make, attack: str) -> None:
    """Nothing that a relay does to records yields a byte, and the channel is over after it."""
    for seed in range(10):
        draw = random.Random(f"{attack}{seed}")
        both = sides()
        records = [both.records(draw.randbytes(100))[0] for _ in range(4)]
        foreign = sides().records(bytes(100))[0]
        backwards = bytes(both.other._seal(Kind.DATA, memoryview(bytes(100))))
        place = draw.randrange(len(records[0]))
        bent = {
            "drop": [records[1]],
            "repeat": [records[0], records[0]],
            "swap": [records[1], records[0]],
            "flip": [records[0][:place] + bytes([records[0][place] ^ 1]) + records[0][place + 1 :], records[1]],
            "truncate": [records[0][:place] + records[1], records[2]],
            "splice": [records[0][:place] + foreign[place:]] if place < 100 else [foreign],
            "reflect": [backwards],
            "forge": [HEADER.pack(16, 0, 0, 100) + draw.randbytes(len(records[0]) - 8)],
        }[attack]
        target = bytearray(200)
        with pytest.raises(RecordRefused):
            while True:
                got = both.deliver(*bent, target=target)
                # A bent length may make it wait for more: which then comes, and does not authenticate.
                bent = [bytes(PART_SIZE + 100)] if got is None else []
                assert got is None or attack == "repeat"
                target[:] = bytes(200)
        assert not any(target)


@pytest.mark.parametrize("kind", [*Kind, 0, 1, 99, 255], ids=str)
@pytest.mark.parametrize("size", [0, 8, 65, PART_SIZE, PART_SIZE + 1])
@pytest.mark.parametrize("within", [False, True], ids=["between", "within"])
def test_every_kind_and_length_in_either_place(sides: Make, kind: int, size: int, within: bool) -> None:
    """Genuinely sealed, and still refused where it has no place: checked before its bytes are waited for."""
    both = sides()
    if within:
        length = 3 * PART_SIZE
        long = bytes(both.one._seal(Kind.LONG, memoryview(length.to_bytes(8, "big"))))
        assert both.deliver(long) is None
    allowed = {
        (False, Kind.DATA): size <= PART_SIZE,
        (False, Kind.LONG): size == 8,
        (False, Kind.REKEY): size == 0,
        (False, Kind.CLOSE): size <= 64,
        (False, Kind.ATTEST): size <= 128 * 1024,
        (True, Kind.PART): size == PART_SIZE,
        (True, Kind.REKEY): size == 0,
    }.get((within, kind), False)
    header = HEADER.pack(kind, 0, 0, size)
    if allowed:
        assert both.deliver(header) is None
    else:
        with pytest.raises(RecordRefused):
            both.deliver(header)


def test_long_messages_arrive_in_parts_and_lengths_are_bounded(sides: Make) -> None:
    both = sides()
    data = os.urandom(2 * PART_SIZE + 5)
    records = both.records(data)
    assert [record[0] for record in records] == [Kind.LONG, Kind.PART, Kind.PART, Kind.PART]
    assert both.deliver(*records) == data
    for length in (0, PART_SIZE):
        both = sides()
        with pytest.raises(RecordRefused):
            both.deliver(bytes(both.one._seal(Kind.LONG, memoryview(length.to_bytes(8, "big")))))
    both = sides()
    huge = bytes(both.one._seal(Kind.LONG, memoryview((MAX_MESSAGE + 1).to_bytes(8, "big"))))
    with pytest.raises(UsageError):
        both.deliver(huge)


@pytest.mark.parametrize("suite", SUITES)
def test_rekeying_by_bytes_records_and_time(sides: Make, suite: Suite) -> None:
    now = [0.0]
    for limits, step in (
        (RekeyLimits(records=3), 0.0),
        (RekeyLimits(bytes=250), 0.0),
        (RekeyLimits(seconds=2.5), 1.0),
    ):
        both = sides(rekey=limits, suites=[suite])
        both.one._sealer._clock = lambda: now[0]
        both.one._sealer.until = now[0] + limits.seconds
        keys = set()
        for number in range(20):
            now[0] += step
            data = b"%0100d" % number
            assert both.deliver(*both.records(data)) == data
            keys.add(bytes(both.one._sealer._key.expose()))
            assert both.one._sealer._key.equals(both.other._opener._key)
        assert both.one._sealer.epoch == both.other._opener.epoch == len(keys) - 1 >= 5


def test_a_day_of_rekeys_and_old_keys_open_nothing(sides: Make) -> None:
    """24 hours at one rekey a second, by a limit of three records."""
    both = sides(rekey=RekeyLimits(records=2))
    first = Secret(both.one._sealer._key.expose())
    for number in range(2000):
        data = number.to_bytes(4, "big")
        records = both.records(data)
        assert both.deliver(*records) == data
    assert both.one._sealer.epoch >= 1990
    old = Opener(both.one.suite, first)
    old.sequence = both.other._opener.sequence
    pin = Pin(100)
    record = both.records(b"late")[-1]
    pin.view[: len(record)] = record
    with pytest.raises(RecordRefused):
        old.open(pin, 0, Kind.DATA, memoryview(bytearray(4)))


@pytest.mark.slow
def test_86400_rekeys(sides: Make) -> None:
    both = sides(rekey=RekeyLimits(records=2))
    for number in range(86_400):
        data = number.to_bytes(4, "big")
        assert both.deliver(*both.records(data)) == data
    assert both.one._sealer.epoch >= 86_390


@pytest.mark.threat("CHAN-19")
def test_a_receiver_holds_the_sender_to_the_limits() -> None:
    key = Secret(bytes(32))
    for suite in SUITES:
        hard = hard_limits(suite)
        assert hard.bytes == (2**40 if suite is Suite.AEGIS_256 else 2**36) and hard.records == 2**32
        for field in ("bytes_left", "records_left"):
            sealer, opener = Sealer(suite, key), Opener(suite, key)
            record = bytes(sealer.seal(Kind.DATA, memoryview(b"x" * 10)))
            pin = Pin(len(record))
            pin.view[:] = record
            setattr(opener, field, 5 if field == "bytes_left" else 0)
            with pytest.raises(RecordRefused, match="used up"):
                opener.open(pin, 0, Kind.DATA, memoryview(bytearray(10)))
    for wrong in ({"records": 2**33}, {"bytes": 2**41}, {"bytes": 0}, {"seconds": 0}, {"records": 1}):
        with pytest.raises(UsageError):
            RekeyLimits(**wrong)
    with pytest.raises(UsageError):
        Sealer(Suite.AES_256_GCM, key, RekeyLimits(bytes=2**37))


@pytest.mark.parametrize("suite", SUITES)
def test_an_end_wipes_the_keys_and_the_message_in_part(sides: Make, suite: Suite) -> None:
    both = sides(suites=[suite])
    target = np.zeros(3 * PART_SIZE, dtype=np.uint8)
    records = both.records(b"\x07" * (3 * PART_SIZE))
    assert both.deliver(*records[:2], target=target) is None
    assert target[:PART_SIZE].all()
    both.other.end("a test")
    assert not target.any()
    for used in (lambda: both.other.pull(None), lambda: both.other.single(memoryview(b"x"))):
        with contextlib.suppress(ChannelClosed, UsageError):
            assert used() in (8, None)
    lane = both.other._opener._lane
    assert lane._aead.openssl is None and lane.open == lane._open_slowly
    assert lane._key is None or not any(lane._key.raw)
    with pytest.raises(ChannelClosed):
        both.other._seal(Kind.DATA, memoryview(b"x"))
    with pytest.raises(UsageError):
        both.other._sealer.seal(Kind.DATA, memoryview(b"x"))


def test_a_close_with_a_code_is_told(sides: Make) -> None:
    both = sides()
    with pytest.raises(ChannelClosed, match="revoked"):
        both.deliver(bytes(both.one.closing("revoked")))
    both = sides()
    hostile = bytes(both.one._seal(Kind.CLOSE, memoryview(b"\x1b[2J")))
    with pytest.raises(ChannelClosed, match="no reason"):
        both.deliver(hostile)


@pytest.mark.threat("CHAN-20")
@pytest.mark.parametrize("size", [64, 65536, PART_SIZE, 8 * PART_SIZE])
def test_nothing_is_allocated_that_grows_with_the_record(world: Any, size: int) -> None:
    ends, made = socket.socketpair(), []

    def shake(end: socket.socket, core: Any) -> None:
        wire = SocketWire(end, 10.0)
        made.append(Channel(wire, wire.handshake(core)))

    cores = world.pair()
    thread = threading.Thread(target=shake, args=(ends[1], cores[1]))
    thread.start()
    shake(ends[0], cores[0])
    thread.join()
    one, other = made
    source, target = bytearray(size), bytearray(size)
    got = threading.Semaphore(0)

    def receive() -> None:
        try:
            while True:
                other.recv_into(target)
                got.release()
        except ChannelError:
            other.close()

    receiver = threading.Thread(target=receive)
    receiver.start()
    for _ in range(2):
        one.send(source)
        got.acquire()
    tracemalloc.start()
    try:
        for _ in range(3):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            one.send(source)
            got.acquire()
            assert tracemalloc.get_traced_memory()[1] - before <= 4096
    finally:
        tracemalloc.stop()
        one.close()
        receiver.join()


def test_threads_that_send_at_once_keep_the_order(world: Any, together: Any) -> None:
    ends = socket.socketpair()
    cores = world.pair()
    wires = [SocketWire(end, 10.0) for end in ends]
    sessions = together(lambda: wires[0].handshake(cores[0]), lambda: wires[1].handshake(cores[1]))
    one, other = (Channel(wire, session) for wire, session in zip(wires, sessions, strict=True))
    threads = [
        threading.Thread(target=lambda n=n: [one.send(b"%d %d" % (n, k)) for k in range(100)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    got = [tuple(map(int, other.recv().split())) for _ in range(400)]
    for thread in threads:
        thread.join()
    for number in range(4):
        assert [k for n, k in got if n == number] == list(range(100))
    one.close()
    other.close()
