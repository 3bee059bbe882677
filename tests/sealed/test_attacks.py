"""Attacks by those who may hold a key: forgery under signed_by=, another's compartment, another origin."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import Epoch, Identity, SigningKey, sealed
from isolate.crypto.aead import Cipher, Suite
from isolate.crypto.kdf import Label
from isolate.crypto.secret import Secret
from isolate.crypto.signing import Purpose
from isolate.errors import (
    IsolateError,
    NoRecipient,
    RolledBack,
    Tampered,
    UnauthenticatedOrigin,
    UsageError,
)
from isolate.sealed import keys
from isolate.sealed.stores import MemorySource

Assemble = Callable[..., Any]


def gcm_multiply(a: int, b: int) -> int:
    """The product in GHASH's field (NIST SP 800-38D, 6.3): bit 127 of the integer is the first bit of the block."""
    product = 0
    for bit in range(127, -1, -1):
        if b >> bit & 1:
            product ^= a
        a = a >> 1 ^ (0xE1 << 120 if a & 1 else 0)
    return product


def forge_equal_tag(ciphertext: bytes, hash_key: bytes) -> bytes:
    """Another GCM ciphertext with the same tag: add d to one block, and d times the hash key to the next one.

    GHASH weighs block i with H to a power that falls by one from block to block; whoever holds the key knows H.
    """
    d, h = int.from_bytes(b"forged".ljust(16, b"\0"), "big"), int.from_bytes(hash_key, "big")
    first = int.from_bytes(ciphertext[:16], "big") ^ d
    second = int.from_bytes(ciphertext[16:32], "big") ^ gcm_multiply(d, h)
    return first.to_bytes(16, "big") + second.to_bytes(16, "big") + ciphertext[32:]


@pytest.fixture
def forged(assemble: Assemble) -> bytes:
    """A file whose first chunk of main was changed by a holder of the key, under an equal tag."""
    from cryptography.hazmat.primitives.ciphers import Cipher as Block
    from cryptography.hazmat.primitives.ciphers import algorithms, modes

    from isolate.crypto.kdf import derive

    assembly = assemble(suite=Suite.AES_256_GCM)
    data = assembly.build()
    params = assembly.params
    key = keys.compartment_key(assembly.file_key, params, "main")
    chunk_key = derive(key, Label.SEALED_CHUNKS, 1, int(params.suite), 4096, "main", salt=params.salt)
    block = Block(algorithms.AES(bytes(chunk_key.expose())), modes.ECB()).encryptor()
    at = assembly.marks["data main"]
    changed = forge_equal_tag(data[at : at + 4096], block.update(bytes(16)))
    return data[:at] + changed + data[at + 4096 :]


@pytest.mark.threat("SEAL-3")
def test_a_chunk_changed_under_an_equal_tag_is_refused(
    forged: bytes, owner: SigningKey, identity: Identity, model: dict[str, Any]
) -> None:
    """The tag alone does not see it (so the forgery is real); the digest that the owner signed does."""
    source = MemorySource(forged)
    digest = sealed.public_facts(source).digest
    with sealed.SealedReader(source, identity=identity, expect=digest, tags_only=True) as reader:
        fooled = reader.read("decoder.weight")
        assert fooled.tobytes() != model["decoder.weight"].tobytes()
        assert fooled.tobytes()[32:] == model["decoder.weight"].tobytes()[32:]
    for pin in ({"signed_by": owner.verifying_key}, {"expect": digest}):
        with pytest.raises(Tampered, match="chunk 0 of main does not match its digest"):
            sealed.load_file(source, identity=identity, **pin)


@pytest.mark.threat("SEAL-3")
def test_a_manifest_rewritten_by_a_key_holder_is_refused(
    assemble: Assemble, owner: SigningKey, stranger: SigningKey, identity: Identity
) -> None:
    """With the file key everything can be made anew but the owner's signature."""

    def renamed(body: dict[str, Any]) -> dict[str, Any]:
        rows = body["tensors"]
        return body | {"tensors": [["evil", *rows[0][1:]], *rows[1:]]}

    good, bad = assemble(), assemble(change={"manifest main": renamed})
    genuine, rewritten = good.build(), bad.build()
    assert "evil" in sealed.load_file(MemorySource(rewritten), identity=identity, signed_by=owner.verifying_key)
    # The owner's directory with the rewritten section: the digest in the directory speaks.
    mixed = rewritten[: bad.marks["directory"]] + genuine[good.marks["directory"] :]
    with pytest.raises(Tampered, match="manifest"):
        sealed.load_file(MemorySource(mixed), identity=identity, signed_by=owner.verifying_key)
    # A directory of one's own: it takes a signature of one's own.
    for change in ({}, {"directory": lambda body: body | {"signer": owner.verifying_key.to_bytes()}}):
        own = assemble(sign=stranger, change={"manifest main": renamed, **change}).build()
        with pytest.raises((UnauthenticatedOrigin, Tampered)):
            sealed.load_file(MemorySource(own), identity=identity, signed_by=owner.verifying_key)


@pytest.mark.threat("SEAL-4")
def test_a_header_slot_rolled_back_is_refused(
    tmp_path: Path, owner: SigningKey, identity: Identity, other: Identity, model: dict[str, Any]
) -> None:
    """One slot as it was before a rewrap: refused. The whole header as it was: only who remembers can tell."""
    path = tmp_path / "m"
    sealed.save_file(model, path, recipients=[other.recipient, identity.recipient], sign=owner)
    before = path.read_bytes()
    sealed.rewrap(path, identity=identity, recipients=[identity.recipient])
    after = path.read_bytes()
    assert before[65536:] == after[65536:]
    signed: dict[str, Any] = {"signed_by": owner.verifying_key}
    for start, stop in ((0, 28672), (28672, 57344)):
        mixed = after[:start] + before[start:stop] + after[stop:]
        with pytest.raises(IsolateError, match="header"):
            sealed.load_file(MemorySource(mixed), identity=other, **signed)
    whole = MemorySource(before)
    with pytest.raises(RolledBack, match="generation"):
        sealed.load_file(whole, identity=other, expect=Epoch(0, generation=2), **signed)
    assert sealed.load_file(whole, identity=other, **signed).keys() == model.keys()


@pytest.mark.threat("SEAL-4")
def test_a_header_of_another_file_is_refused(assemble: Assemble, owner: SigningKey, identity: Identity) -> None:
    """The header of an older version of the model, which the same recipient opens, before the newer data."""
    old, new = assemble(seed=b"old", epoch=4).build(), assemble(seed=b"new").build()
    with pytest.raises(Tampered, match="different files"):
        sealed.load_file(MemorySource(old[:65536] + new[65536:]), identity=identity, signed_by=owner.verifying_key)


@pytest.mark.threat("SEAL-5")
def test_the_holder_of_one_compartment_learns_nothing_of_another(
    assemble: Assemble, owner: SigningKey, identity: Identity, model: dict[str, Any]
) -> None:
    assembly = assemble(metadata={"secret": "note"})
    data = assembly.build()
    source = MemorySource(data)
    facts = sealed.public_facts(source)
    assert facts.compartments == ("encoder", "main")
    released = sealed.compartment_keys(sealed.open_file_key(facts, identity), facts, ["encoder"])

    class Enclave:
        def unlock(self, facts: sealed.PublicFacts) -> sealed.CompartmentKeys:
            return released

    with sealed.safe_open(source, identity=Enclave()) as file:
        assert file.keys() == ["encoder.bias", "encoder.weight"]
        assert file.metadata() is None
        np.testing.assert_array_equal(file.get_tensor("encoder.weight"), model["encoder.weight"])
        for name in ("decoder.weight", "step"):
            with pytest.raises(UsageError):
                file.get_tensor(name)
            with pytest.raises(UsageError):
                file.get_slice(name)
    # The key in hand fits no part of another compartment, whatever it is called: table, manifest, chunks, metadata.
    key, params = released.keys["encoder"], assembly.params
    for name in ("main", "*"):
        for label in (Label.SEALED_TABLE, Label.SEALED_MANIFEST, Label.SEALED_CHUNKS):
            for called in ("encoder", name):
                cipher: Cipher = keys.part_cipher(key, params, called, label)
                for at, stop in parts_of(assembly, name):
                    assert cipher.open(data[at:stop], keys.nonce(params, 0)) is None
        assert keys.compartment_commitment(key, params, name) != dict(rows_of(facts))[name]
    with pytest.raises(Tampered, match="commits"):
        wrong = sealed.CompartmentKeys(facts.digest, {"main": key})
        sealed.load_file(source, identity=type("", (), {"unlock": lambda self, facts: wrong})())


def parts_of(assembly: Any, name: str) -> list[tuple[int, int]]:
    """Where table and manifest of a compartment stand in the file."""
    marks = assembly.marks
    order = sorted(marks.values())
    found = [marks[f"table {name}"], marks[f"manifest {name}"]]
    return [(at, next(stop for stop in order if stop > at)) for at in found]


def rows_of(facts: sealed.PublicFacts) -> list[tuple[str, bytes]]:
    return [(row.id, row.commitment) for row in facts.contents.rows]


@pytest.mark.threat("SEAL-5")
def test_a_release_is_good_for_one_file_only(assemble: Assemble, identity: Identity) -> None:
    """Keys that were released for one digest open no other file, though its key be the same."""
    first = assemble()
    facts = sealed.public_facts(MemorySource(first.build()))
    released = sealed.compartment_keys(first.file_key, facts)
    assert set(released.keys) == {"*", "encoder", "main"}
    again = MemorySource(assemble(epoch=4).build())
    with pytest.raises(RolledBack):
        sealed.load_file(again, identity=type("", (), {"unlock": lambda self, facts: released})())


@pytest.mark.threat("SEAL-6")
def test_without_a_pin_nothing_opens(assemble: Assemble, owner: SigningKey, identity: Identity) -> None:
    """Anyone can seal to a public recipient, so who sealed it must be said; an epoch alone says nothing."""
    source = MemorySource(assemble().build())
    for how in ({}, {"expect": Epoch(1)}):
        with pytest.raises(UnauthenticatedOrigin):
            sealed.load_file(source, identity=identity, **how)
    whole = type("", (), {"unlock": lambda self, facts: sealed.open_file_key(facts, identity)})()
    with pytest.raises(UnauthenticatedOrigin):
        sealed.load_file(source, identity=whole)
    assert sealed.load_file(source, identity=identity, INSECURE_any_origin=True)


@pytest.mark.threat("SEAL-6")
def test_what_a_stranger_sealed_is_refused(
    assemble: Assemble, owner: SigningKey, stranger: SigningKey, identity: Identity, other: Identity
) -> None:
    mine, theirs = MemorySource(assemble().build()), MemorySource(assemble(sign=stranger).build())
    with pytest.raises(UnauthenticatedOrigin):
        sealed.load_file(theirs, identity=identity, signed_by=owner.verifying_key)
    with pytest.raises(UnauthenticatedOrigin):
        sealed.load_file(theirs, identity=identity, signed_by=str(owner.verifying_key))
    with pytest.raises(RolledBack):
        sealed.load_file(theirs, identity=identity, expect=sealed.public_facts(mine).digest)
    with pytest.raises(NoRecipient):
        sealed.load_file(mine, identity=other, signed_by=owner.verifying_key)


@pytest.mark.threat("SEAL-7")
def test_an_older_file_is_refused(assemble: Assemble, owner: SigningKey, identity: Identity) -> None:
    signed: dict[str, Any] = {"identity": identity, "signed_by": owner.verifying_key}
    source = MemorySource(assemble(epoch=7).build())
    assert sealed.load_file(source, expect=Epoch(7), **signed)
    with pytest.raises(RolledBack, match="epoch 7, where at least 8"):
        sealed.load_file(source, expect=Epoch(8), **signed)
    with pytest.raises(RolledBack):
        sealed.load_file(source, expect=bytes(32), **signed)
    for wrong in (b"short", "0" * 32, bytearray(32), 7):
        with pytest.raises(UsageError, match="expect="):
            sealed.load_file(source, expect=wrong, **signed)


@pytest.mark.threat("SEAL-8")
def test_strings_shows_no_name_dtype_or_metadata(tmp_path: Path, owner: SigningKey, identity: Identity) -> None:
    """As strings(1): every run of four and more printable bytes, searched for what must not show."""
    names = ["very.secret.layer.weight", "encoder.hush", "F32", "BF16", "float32", "U8", "quantised by Alice"]
    tensors = {names[0]: np.ones((300, 300), np.float32), names[1]: np.zeros(9, np.uint8)}
    path = tmp_path / "m"
    globs = {"first": ["very.*"]}
    sealed.save_file(
        tensors, path, recipients=[identity.recipient], sign=owner, metadata={"note": names[-1]}, compartments=globs
    )
    runs = b"\n".join(re.findall(rb"[\x20-\x7e]{4,}", path.read_bytes())).decode()
    assert "first" in runs  # ids of compartments are public, so the search can find
    for name in [*names, "very", "secret", "encoder", "hush", "Alice", "note", "shape", "tensors", "metadata"]:
        assert name not in runs or len(name) < 4, name
    assert b"note" not in path.read_bytes()
    assert b"BF16" not in path.read_bytes()


@pytest.mark.threat("SEAL-9")
def test_a_signature_for_another_purpose_is_none(assemble: Assemble, owner: SigningKey, identity: Identity) -> None:
    def other_purpose(raw: bytes) -> bytes:
        return raw[:-5325] + owner.sign_hybrid(Purpose.POLICY, raw[:-5325])

    with pytest.raises(Tampered, match="signature"):
        sealed.public_facts(MemorySource(assemble(change={"directory raw": other_purpose}).build()))


def test_no_secret_shows_in_a_repr_or_message(assemble: Assemble, identity: Identity) -> None:
    assembly = assemble()
    facts = sealed.public_facts(MemorySource(assembly.build()))
    released = sealed.compartment_keys(assembly.file_key, facts)
    key = bytes(released.keys["main"].expose())
    for shown in (repr(released), str(released), repr(facts), repr(sealed.Passphrase("hush hush"))):
        assert key.hex() not in shown
        assert "hush" not in shown
        assert bytes(assembly.file_key.expose()).hex() not in shown
    assert Secret(key).equals(released.keys["main"])
