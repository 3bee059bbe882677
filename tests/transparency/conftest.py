"""A log of 600 entries, its keys, and its checkpoints at every size that a test asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from isolate.crypto import merkle
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey
from isolate.transparency import Checkpoint, Witness, sign_checkpoint

ORIGIN = "example.com/log"


def key(number: int) -> SigningKey:
    return SigningKey(Secret(bytes([number]) * 32))


@pytest.fixture(scope="session")
def log() -> Any:
    """``log.note(size)`` signs a checkpoint, ``log.seen(size)`` verifies it; ``log.fork`` is a second history."""
    store, fork, signer, size = merkle.MemoryStore(), merkle.MemoryStore(), key(1), 600
    entries = [b"entry %d" % number for number in range(size)]
    merkle.extend(store, 0, entries)
    merkle.extend(fork, 0, [*entries[:100], b"another", *entries[101:]])
    public = signer.verifying_key.ed25519

    def note(size: int, tree: Any = store) -> str:
        return sign_checkpoint(signer, ORIGIN, size, merkle.root(tree, size))

    return SimpleNamespace(
        store=store,
        fork=fork,
        entries=entries,
        size=size,
        origin=ORIGIN,
        key=signer,
        public=public,
        note=note,
        seen=lambda size: Checkpoint.verify(note(size), ORIGIN, public),
    )


@pytest.fixture(scope="session")
def witnesses() -> Any:
    """Three witnesses: ``.keys`` to cosign with, ``.known`` as a client is configured with them."""
    keys = [key(number) for number in (11, 12, 13)]
    known = [Witness(f"example.com/w{n}", one.verifying_key.ed25519) for n, one in enumerate(keys)]
    return SimpleNamespace(keys=keys, known=known)
