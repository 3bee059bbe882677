"""X-Wing through HPKE: the draft's vectors, and boxes that do not open."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives import hpke

from isolate.crypto import kem
from isolate.crypto.kem import OVERHEAD, PUBLIC_SIZE, Identity, Recipient
from isolate.crypto.secret import Secret
from isolate.errors import KeyFormatError, NoRecipient, UsageError

XWING, SHA256, CHACHA20 = 0x647A, 1, 3


@pytest.fixture(scope="module")
def vector(vectors: Path) -> dict[str, Any]:
    """The one vector in base mode with X-Wing and HKDF-SHA-256. Its AEAD is ChaCha20-Poly1305."""
    everything = json.loads((vectors / "hpke" / "hpke-pq.json").read_text())
    assert len(everything) == 13
    found = [one for one in everything if (one["kem_id"], one["kdf_id"], one["mode"]) == (XWING, SHA256, 0)]
    assert len(found) == 1
    assert found[0]["aead_id"] == CHACHA20
    return dict(found[0])


@pytest.fixture(scope="module")
def identity() -> Identity:
    return Identity(Secret(bytes(range(32))))


def test_the_seed_expands_to_the_vectors_public_key(vector: dict[str, Any]) -> None:
    identity = Identity(Secret(bytes.fromhex(vector["skRm"])))
    assert identity.recipient.raw == bytes.fromhex(vector["pkRm"])


def test_the_vectors_box_opens(vector: dict[str, Any]) -> None:
    """Encapsulation, combiner and key schedule agree with the draft.

    The vectors bind associated data, which the public API does not have: its own function for tests does.
    Only the first message of a context can be opened, since the API is single-shot.
    """
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
    identity = Identity(Secret(bytes.fromhex(vector["skRm"])))
    first = vector["encryptions"][0]
    assert first["nonce"] == vector["base_nonce"]
    boxed = bytes.fromhex(vector["enc"] + first["ct"])
    info, aad = bytes.fromhex(vector["info"]), bytes.fromhex(first["aad"])
    opened = openssl.hpke._decrypt_with_aad(suite, boxed, identity._private, info, aad)
    assert opened == bytes.fromhex(first["pt"])


def test_the_suite_is_the_one_of_the_specification() -> None:
    """The vectors prove KEM and KDF; this pins that ours differs from them in the AEAD only."""
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    identity = Identity.generate()
    boxed = identity.recipient.seal(b"key", info=b"info")
    assert suite.decrypt(boxed, identity._private, info=b"info") == b"key"
    assert len(boxed) == 3 + OVERHEAD
    assert kem.OVERHEAD == 1136


def test_any_changed_byte_is_refused(identity: Identity) -> None:
    boxed = identity.recipient.seal(b"file key", info=b"info")
    # Every byte of the curve's part, the text and the tag, and every 37th of the lattice's part.
    for index in [*range(0, 1088, 37), *range(1088, len(boxed))]:
        changed = bytearray(boxed)
        changed[index] ^= 1
        with pytest.raises(NoRecipient):
            identity.open(bytes(changed), info=b"info")


def test_every_truncation_and_extension_is_refused(identity: Identity) -> None:
    boxed = identity.recipient.seal(b"file key", info=b"info")
    for size in [*range(40), *range(1080, len(boxed))]:
        with pytest.raises(NoRecipient):
            identity.open(boxed[:size], info=b"info")
    with pytest.raises(NoRecipient):
        identity.open(boxed + b"\0", info=b"info")


def test_another_info_or_identity_does_not_open(identity: Identity) -> None:
    boxed = identity.recipient.seal(b"file key", info=b"info")
    assert identity.open(boxed, info=b"info").equals(b"file key")
    for info in (b"", b"inf", b"info\0"):
        with pytest.raises(NoRecipient):
            identity.open(boxed, info=info)
    with pytest.raises(NoRecipient):
        Identity.generate().open(boxed, info=b"info")


@pytest.mark.threat("KEY-9")
def test_both_halves_of_the_key_count(identity: Identity) -> None:
    """Who holds only the lattice key, or only the curve key, of a recipient opens nothing."""
    boxed = identity.recipient.seal(b"file key", info=b"")
    seed = bytearray(range(32))
    seed[0] ^= 1
    stranger = Identity(Secret(seed))
    lattice = identity.recipient.raw[:1184] + stranger.recipient.raw[1184:]
    curve = stranger.recipient.raw[:1184] + identity.recipient.raw[1184:]
    for mixed in (Recipient(lattice), Recipient(curve)):
        for holder in (identity, stranger):
            with pytest.raises(NoRecipient):
                holder.open(mixed.seal(b"file key", info=b""), info=b"")
    assert identity.open(boxed, info=b"").equals(b"file key")


@pytest.mark.parametrize("size", [0, 32, PUBLIC_SIZE - 1, PUBLIC_SIZE + 1])
def test_a_recipient_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(KeyFormatError):
        Recipient(bytes(size))


def test_recipients_that_are_no_keys_are_refused(identity: Identity) -> None:
    small_order = identity.recipient.raw[:1184] + bytes(32)
    for raw in (bytes(PUBLIC_SIZE), b"\xff" * PUBLIC_SIZE, small_order):
        with pytest.raises(KeyFormatError):
            Recipient(raw).seal(b"x", info=b"")


def test_an_identity_is_not_shown_copied_or_pickled(identity: Identity) -> None:
    seed = bytes(range(32))
    for text in (repr(identity), str(identity), f"{identity}"):
        assert seed.hex() not in text
        assert "hidden" in text
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UsageError):
            leak(identity)
    with pytest.raises(TypeError):
        vars(identity)


def test_key_file_round_trip(identity: Identity, tmp_path: Path) -> None:
    path = tmp_path / "id.key"
    identity.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load(path).recipient == identity.recipient
    assert Recipient.parse(str(identity.recipient)) == identity.recipient
