"""Throughput of sealing and opening in memory; `isolate bench sealed` measures against others.

Run it: pytest benchmarks/test_sealed.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isolate import Identity, SigningKey, sealed
from isolate.crypto.aead import Suite
from isolate.sealed.stores import MemorySink, MemorySource

SIZE = 32 << 20
OWNER, IDENTITY = SigningKey.generate(), Identity.generate()
TENSOR = np.random.default_rng(1).integers(0, 255, SIZE, np.uint8)


def seal(suite: Suite) -> bytes:
    sink = MemorySink()
    with sealed.SealedWriter(sink, recipients=[IDENTITY.recipient], sign=OWNER, suite=suite) as writer:
        writer.add("w", TENSOR)
    return sink.data


@pytest.mark.parametrize("suite", list(Suite), ids=lambda suite: suite.title)
def test_seal(benchmark: Any, suite: Suite) -> None:
    assert len(benchmark(seal, suite)) > SIZE


@pytest.mark.parametrize("tags_only", [False, True], ids=["digests", "tags only"])
@pytest.mark.parametrize("suite", list(Suite), ids=lambda suite: suite.title)
def test_open(benchmark: Any, suite: Suite, tags_only: bool) -> None:
    source = MemorySource(seal(suite))

    def opened() -> Any:
        return sealed.load_file(source, identity=IDENTITY, signed_by=OWNER.verifying_key, tags_only=tags_only)

    assert np.array_equal(benchmark(opened)["w"], TENSOR)


def test_open_lazily(benchmark: Any) -> None:
    """Header, footer and one row out of many: what a lookup costs."""
    source = MemorySource(seal(Suite.AEGIS_256))

    def row() -> Any:
        with sealed.safe_open(source, identity=IDENTITY, signed_by=OWNER.verifying_key) as file:
            return file.get_slice("w")[SIZE // 2 : SIZE // 2 + 384]

    assert len(benchmark(row)) == 384
