"""What the tests of sealed files share: keys, a small model, and files in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from isolate import Identity, SigningKey, sealed
from isolate.crypto.secret import Secret
from isolate.sealed.stores import MemorySink


@pytest.fixture(scope="session")
def owner() -> SigningKey:
    return SigningKey(Secret(b"owner".ljust(32, b".")))


@pytest.fixture(scope="session")
def stranger() -> SigningKey:
    return SigningKey(Secret(b"stranger".ljust(32, b".")))


@pytest.fixture(scope="session")
def identity() -> Identity:
    return Identity(Secret(b"identity".ljust(32, b".")))


@pytest.fixture(scope="session")
def other() -> Identity:
    return Identity(Secret(b"other".ljust(32, b".")))


@pytest.fixture(scope="session")
def model() -> dict[str, np.ndarray[Any, Any]]:
    """Five tensors, the first and third of several 4 KiB chunks."""
    generator = np.random.default_rng(1)
    return {
        "encoder.weight": generator.standard_normal((50, 64)).astype(np.float32),
        "encoder.bias": generator.standard_normal(64).astype(np.float16),
        "decoder.weight": generator.integers(-9, 9, (7, 11, 40)).astype(np.int64),
        "decoder.empty": np.zeros((0, 3), np.float64),
        "step": np.array(17, np.int32),
    }


@pytest.fixture(scope="session")
def seal(owner: SigningKey, identity: Identity) -> Callable[..., bytes]:
    """Seal into memory with 4 KiB chunks; keyword arguments as in SealedWriter."""

    def sealed_bytes(tensors: dict[str, np.ndarray[Any, Any]], **options: Any) -> bytes:
        sink = MemorySink()
        options = {"recipients": [identity.recipient], "sign": owner, "chunk_size": 4096, "threads": 1} | options
        with sealed.SealedWriter(sink, **options) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        return sink.data

    return sealed_bytes
