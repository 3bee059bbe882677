"""Version 1 is frozen: the files in tests/vectors/sealed open, and the writer still makes them byte for byte.

Randomness is handed in from a seed. Two things cannot be: the encapsulation of an X-Wing stanza, which is taken
from the golden file, and the hedged ML-DSA-65 signature (3309 bytes), which is verified and not compared.

A new golden file is made with ``python tests/sealed/test_golden.py NAME``; an old one is never made again.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import Identity, Recipient, SigningKey, sealed
from isolate.crypto.aead import Suite
from isolate.crypto.secret import Secret
from isolate.sealed.layout import JOURNAL, JOURNAL_OFFSET
from isolate.sealed.stores import MemorySink, MemorySource

FOLDER = Path(__file__).parents[1] / "vectors" / "sealed"
MLDSA65_SIGNATURE, TRAILER = 3309, 16

# What each file is, beside its seed (its name): everything else follows.
FILES: dict[str, dict[str, Any]] = {
    "aegis-256-x-wing": {"suite": Suite.AEGIS_256},
    "aes-256-gcm-passphrase": {"suite": Suite.AES_256_GCM, "passphrase": "correct horse battery staple"},
    "chacha20-poly1305-x-wing": {"suite": Suite.CHACHA20_POLY1305},
    "rewrap-interrupted": {"suite": Suite.AEGIS_256, "interrupted": True},
}


def stream(seed: str) -> Callable[[int], bytes]:
    """Bytes from a seed, in the place of secrets.token_bytes."""
    count = iter(range(1 << 30))
    return lambda size: hashlib.shake_256(f"{seed}/{next(count)}".encode()).digest(size)


def key_of(name: str, what: str) -> Secret:
    return Secret(hashlib.sha256(f"{name}/{what}".encode()).digest())


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    return {
        "embed.weight": np.arange(3000, dtype=np.float32).reshape(30, 100) / 7,
        "head.weight": np.arange(-60, 60, dtype=np.int8).reshape(2, 3, 20),
        "head.bias": np.array([1, 2, 3], np.float16),
        "empty": np.zeros((0, 4), np.int64),
        "scalar": np.array(2.5),
    }


def make(name: str, monkeypatch: pytest.MonkeyPatch, boxes: Iterator[str] | None) -> tuple[bytes, list[str]]:
    """The bytes of a golden file, and the boxes of its X-Wing stanzas (from ``boxes``, or made now)."""
    about, used, genuine = FILES[name], [], Recipient.seal

    def box(recipient: Recipient, plaintext: bytes | memoryview, *, info: bytes) -> bytes:
        made = bytes.fromhex(next(boxes)) if boxes is not None else genuine(recipient, plaintext, info=info)
        used.append(made.hex())
        return made

    monkeypatch.setattr(secrets, "token_bytes", stream(name))
    monkeypatch.setattr(Recipient, "seal", box)
    identity, sink = Identity(key_of(name, "identity")), MemorySink()
    phrase = about.get("passphrase")
    recipients = [sealed.Passphrase(phrase, memory=64, passes=2)] if phrase else [identity.recipient]
    sign = SigningKey(key_of(name, "signing"))
    writer = sealed.SealedWriter(
        sink, recipients=recipients, sign=sign, suite=about["suite"], chunk_size=4096,
        metadata={"format": "np", "note": "golden"}, model_id=f"golden/{name}", epoch=7, previous=bytes(range(32)),
        compartments={"head": ["head.*"]},
    )  # fmt: skip
    with writer:
        for tensor in ("head.weight", "head.bias", "embed.weight", "empty", "scalar"):
            writer.add(tensor, tensors()[tensor])
    data = bytearray(sink.data)
    if about.get("interrupted"):
        # The journal word is set, and a part of the slot that is written first is missing.
        data[256:512] = bytes(256)
        data[JOURNAL_OFFSET : JOURNAL_OFFSET + len(JOURNAL)] = JOURNAL
    return bytes(data), used


def comparable(data: bytes) -> bytes:
    """Everything but the ML-DSA-65 signature, which stands before the trailer."""
    return data[: -MLDSA65_SIGNATURE - TRAILER] + data[-TRAILER:]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
    assert found.keys() == FILES.keys()
    assert {path.stem for path in FOLDER.glob("*.sealed")} == set(FILES)
    return found


@pytest.mark.threat("SEAL-15")
@pytest.mark.parametrize("name", FILES)
def test_the_writer_makes_the_golden_file(
    name: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = (FOLDER / f"{name}.sealed").read_bytes()
    made, _ = make(name, monkeypatch, iter(expected[name]["boxes"]))
    assert len(made) == len(golden)
    pairs = enumerate(zip(comparable(made), comparable(golden), strict=True))
    assert [at for at, (ours, theirs) in pairs if ours != theirs][:1] == []


@pytest.mark.parametrize("name", FILES)
def test_the_golden_file_opens(name: str, expected: dict[str, Any]) -> None:
    about = expected[name]
    golden = (FOLDER / f"{name}.sealed").read_bytes()
    assert hashlib.sha256(golden).hexdigest() == about["sha256"]
    who = sealed.Passphrase(about["passphrase"]) if "passphrase" in about else Identity.parse(about["identity"])
    facts = sealed.public_facts(MemorySource(golden))
    assert facts.digest.hex() == about["digest"]
    assert (facts.model_id, facts.epoch, facts.previous) == (f"golden/{name}", 7, bytes(range(32)))
    with sealed.safe_open(MemorySource(golden), identity=who, signed_by=about["signed_by"]) as file:
        assert file.metadata() == {"format": "np", "note": "golden"}
        for tensor, value in tensors().items():
            np.testing.assert_array_equal(file.get_tensor(tensor), value)


def write(name: str) -> None:
    """Make a golden file that is not there yet."""
    path, index = FOLDER / f"{name}.sealed", FOLDER / "golden.json"
    if path.exists():
        sys.exit(f"{path} is frozen")
    with pytest.MonkeyPatch.context() as monkeypatch:
        data, boxes = make(name, monkeypatch, None)
    about: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "boxes": boxes}
    about["digest"] = sealed.public_facts(MemorySource(data)).digest.hex()
    about["signed_by"] = str(SigningKey(key_of(name, "signing")).verifying_key)
    if "passphrase" in FILES[name]:
        about["passphrase"] = FILES[name]["passphrase"]
    else:
        identity = Identity(key_of(name, "identity"))
        identity.save(FOLDER / "key")
        about["identity"] = (FOLDER / "key").read_text().splitlines()[-1]
        (FOLDER / "key").unlink()
    found = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    index.write_text(json.dumps(found | {name: about}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
