"""What a channel costs by itself: one record sealed and opened, one handshake; `isolate bench channels` compares.

Run it: pytest benchmarks/test_channels.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from isolate.channel import Handshake
from isolate.channel.record import Kind, Opener, Sealer
from isolate.cli.bench.lines import attested_pair
from isolate.crypto.aead import Pin, Suite
from isolate.crypto.secret import Secret


@pytest.mark.parametrize("size", [64, 4096, 1 << 20])
@pytest.mark.parametrize("suite", list(Suite), ids=lambda suite: suite.title)
def test_seal(benchmark: Any, suite: Suite, size: int) -> None:
    sealer, data = Sealer(suite, Secret.generate(32)), memoryview(bytes(size))
    benchmark(sealer.seal, Kind.DATA, data)


@pytest.mark.parametrize("size", [64, 4096, 1 << 20])
@pytest.mark.parametrize("suite", list(Suite), ids=lambda suite: suite.title)
def test_open(benchmark: Any, suite: Suite, size: int) -> None:
    key = Secret.generate(32)
    opener, record = Opener(suite, key), Sealer(suite, key).seal(Kind.DATA, memoryview(bytes(size)))
    pin, out = Pin(len(record)), memoryview(bytearray(size))
    pin.view[:] = record

    def again() -> None:
        # The same record every time: only here may a number come twice.
        opener.sequence = 0
        opener.open(pin, 0, Kind.DATA, out)

    benchmark(again)


def _deliver(core: Handshake, data: bytes) -> bytes:
    answer = b""
    while data:
        event, size = core.parse(data[:8])
        end = 8 + core.body_size(event, size)
        answer += core.step(event, data[8:end])
        data = data[end:]
    return answer


@pytest.fixture
def handshake() -> Callable[[], None]:
    first, second, expect = attested_pair()

    def shake() -> None:
        one = Handshake(initiator=True, identity=first, expect=expect(1))
        other = Handshake(initiator=False, identity=second, expect=expect(0))
        data = one.start()
        while data:
            data = _deliver(one, _deliver(other, data))

    return shake


def test_handshake_of_both_sides(benchmark: Any, handshake: Callable[[], None]) -> None:
    benchmark(handshake)
