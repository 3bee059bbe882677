"""Any one bit, anywhere: refused. Every bit of a small file (slow), and samples of it and of a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from isolate import Identity, SigningKey, sealed
from isolate.errors import RefusedError
from isolate.sealed import layout
from isolate.sealed.stores import MemorySource


def survivors(data: bytearray, bits: Iterable[int], open_it: Callable[[MemorySource], Any]) -> list[int]:
    """The bits whose flip is not refused. The file is as it was afterwards."""
    found = []
    source = MemorySource(data)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        try:
            open_it(source)
            found.append(bit)
        except RefusedError:
            pass
        data[bit // 8] ^= 1 << bit % 8
    return found


@pytest.fixture(scope="module")
def small(seal: Callable[..., bytes]) -> bytearray:
    """One chunk of 4 KiB, two sections of 4 KiB: about 85 KB, 64 KiB of it header."""
    return bytearray(seal({"w": np.arange(1000, dtype=np.int32)}, metadata={"a": "b"}))


@pytest.fixture(scope="module")
def open_it(owner: SigningKey, identity: Identity) -> Callable[[MemorySource], Any]:
    def opened(source: MemorySource) -> Any:
        return sealed.load_file(source, identity=identity, signed_by=owner.verifying_key, threads=1)

    return opened


@pytest.mark.threat("SEAL-11")
def test_sampled_bits_of_a_small_file(small: bytearray, open_it: Callable[[MemorySource], Any]) -> None:
    generator = np.random.default_rng(11)
    footer = generator.integers(layout.HEADER_SIZE * 8, len(small) * 8, 600)
    header = generator.integers(0, layout.HEADER_SIZE * 8, 600)
    edges = [bit for at in (0, 8, 12, 16, 28671, 28672, 61440, 65535) for bit in range(at * 8, at * 8 + 8)]
    last = range(len(small) * 8 - 128, len(small) * 8)
    bits = [*map(int, footer), *map(int, header), *edges, *last]
    assert survivors(small, bits, open_it) == []
    assert open_it(MemorySource(small))


@pytest.mark.slow
@pytest.mark.threat("SEAL-11")
def test_every_bit_of_a_small_file(
    small: bytearray, open_it: Callable[[MemorySource], Any], identity: Identity, owner: SigningKey
) -> None:
    """Some 700,000 bits. Behind the header keys come from a release, which is quicker and checks no more."""
    facts = sealed.public_facts(MemorySource(small))
    keys = sealed.compartment_keys(sealed.open_file_key(facts, identity), facts)
    release = type("Release", (), {"unlock": lambda self, facts: keys})()

    def released(source: MemorySource) -> Any:
        return sealed.load_file(source, identity=release, signed_by=owner.verifying_key, threads=1)

    assert len(released(MemorySource(small))) == 1
    assert survivors(small, range(layout.HEADER_SIZE * 8), open_it) == []
    assert survivors(small, range(layout.HEADER_SIZE * 8, len(small) * 8), released) == []


@pytest.mark.slow
@pytest.mark.threat("SEAL-11")
def test_ten_thousand_bits_of_a_large_file(
    seal: Callable[..., bytes], owner: SigningKey, identity: Identity
) -> None:
    """64 MiB, chunks of 1 MiB, four tensors in each: the tensor that holds the bit is read."""
    tensors = {f"t{i}": np.random.default_rng(i).integers(0, 255, 256 << 10, np.uint8) for i in range(256)}
    data = bytearray(seal(tensors, chunk_size=layout.CHUNK_SIZE))

    def read_where(bit: int) -> Callable[[MemorySource], Any]:
        def opened(source: MemorySource) -> Any:
            with sealed.SealedReader(source, identity=identity, signed_by=owner.verifying_key, threads=1) as reader:
                return reader.read(f"t{min(255, max(0, (bit // 8 - layout.HEADER_SIZE) >> 18))}")

        return opened

    bits = np.random.default_rng(12).integers(0, len(data) * 8, 10_000)
    assert [bit for bit in map(int, bits) if survivors(data, [bit], read_where(bit))] == []
