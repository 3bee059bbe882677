"""Proofs as values, and the memory that refuses a fork and a shrink."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolate.crypto import cbor, merkle
from isolate.errors import LogRefused
from isolate.transparency import (
    Checkpoint,
    ConsistencyProof,
    InclusionProof,
    LogMemory,
    check_store,
    cosign,
    sign_checkpoint,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "merkle" / "happy_paths.json"


def test_proofs_of_certificate_transparency_verify() -> None:
    vectors = json.loads(VECTORS.read_text())
    assert {kind: len(cases) for kind, cases in vectors.items()} == {"inclusion": 3, "consistency": 3}
    for case in vectors["inclusion"]:
        proof = [base64.b64decode(one) for one in case["proof"]]
        leaf, root = base64.b64decode(case["leafHash"]), base64.b64decode(case["root"])
        assert merkle.verify_inclusion(case["leafIdx"], case["treeSize"], leaf, proof, root)
        assert not merkle.verify_inclusion(case["leafIdx"] - 1, case["treeSize"], leaf, proof, root)
        assert not merkle.verify_inclusion(case["leafIdx"], case["treeSize"], leaf, [*proof, root], root)
    for case in vectors["consistency"]:
        proof = [base64.b64decode(one) for one in case["proof"]]
        roots = base64.b64decode(case["root1"]), base64.b64decode(case["root2"])
        assert merkle.verify_consistency(case["size1"], case["size2"], proof, *roots)
        assert not merkle.verify_consistency(case["size1"] + 1, case["size2"], proof, *roots)
        assert not merkle.verify_consistency(case["size1"], case["size2"], proof[:-1], *roots)


def test_proofs_survive_their_encoding(log: Any) -> None:
    inclusion = InclusionProof.build(log.store, 77, 300)
    assert InclusionProof.parse(inclusion.encode()) == inclusion
    InclusionProof.parse(inclusion.encode()).verify(log.entries[77], log.seen(300))
    consistency = ConsistencyProof.build(log.store, 77, 300)
    assert ConsistencyProof.parse(consistency.encode()) == consistency
    ConsistencyProof.parse(consistency.encode()).verify(log.seen(77), log.seen(300))


@pytest.mark.threat("LOG-1")
def test_an_entry_that_is_not_there_has_no_proof(log: Any) -> None:
    proof = InclusionProof.build(log.store, 77, 300)
    for entry, size, given_proof in (
        (log.entries[78], 300, proof),
        (log.entries[77], 301, proof),
        (log.entries[77], 300, InclusionProof(78, 300, proof.hashes)),
        (log.entries[77], 301, InclusionProof(77, 301, proof.hashes)),
    ):
        with pytest.raises(LogRefused):
            given_proof.verify(entry, log.seen(size))
    with pytest.raises(LogRefused, match="the proof is for 300 entries, the checkpoint for 301"):
        proof.verify(log.entries[77], log.seen(301))


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"version": 2, "index": 0, "size": 1, "hashes": []},
        {"version": 1, "index": -1, "size": 1, "hashes": []},
        {"version": 1, "index": 0, "size": 1, "hashes": [bytes(31)]},
        {"version": 1, "index": 0, "size": 1, "hashes": ["x" * 32]},
        {"version": 1, "index": 0, "size": 1, "hashes": [bytes(32)] * 65},
        {"version": 1, "index": 0, "size": True, "hashes": []},
        {"version": 1, "index": 0, "size": 1, "hashes": [], "more": 1},
        {"version": 1, "old": 0, "new": 1, "hashes": [[]]},
    ],
    ids=repr,
)
def test_malformed_proofs_are_refused(value: dict[str, Any]) -> None:
    for kind in (InclusionProof, ConsistencyProof):
        with pytest.raises(LogRefused):
            kind.parse(cbor.encode(value))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=80))
def test_random_bytes_are_no_proof_and_no_other_error(data: bytes) -> None:
    for kind in (InclusionProof, ConsistencyProof):
        with pytest.raises(LogRefused):
            kind.parse(data)


def memory_at(log: Any, size: int) -> LogMemory:
    memory = LogMemory(log.origin, log.public)
    memory.advance(log.note(size))
    return memory


def test_the_memory_moves_forward_along_proofs(log: Any) -> None:
    memory = memory_at(log, 1)
    for old, new in ((1, 2), (2, 100), (100, 100), (100, 600)):
        proof = None if old == new else ConsistencyProof.build(log.store, old, new)
        assert memory.advance(log.note(new), proof).size == new
    again = LogMemory(log.origin, log.public, remembered=memory.latest.text if memory.latest else None)
    assert again.latest == memory.latest


def test_the_memory_may_begin_at_an_empty_log(log: Any) -> None:
    memory = memory_at(log, 0)
    assert memory.advance(log.note(7), ConsistencyProof.build(log.store, 0, 7)).size == 7


REFUSED = {
    "shrunk log": (50, None, "log_shrunk"),
    "emptied log": (0, None, "log_shrunk"),
    "forked log of equal size": (200, None, "log_forked"),
    "no proof": (300, None, "log_refused"),
    "forked log that grew": (300, (200, 300), "log_inconsistent"),
    "proof for other sizes": (300, (199, 300), "log_refused"),
}


@pytest.mark.threat("LOG-4")
@pytest.mark.parametrize("attack", REFUSED)
def test_forked_and_shrunk_logs_are_refused_and_change_nothing(log: Any, attack: str) -> None:
    size, path, code = REFUSED[attack]
    memory = memory_at(log, 200)
    before = memory.latest
    tree = log.fork if "forked" in attack else log.store
    proof = None if path is None else ConsistencyProof.build(tree, *path)
    with pytest.raises(LogRefused) as caught:
        memory.advance(log.note(size, tree), proof)
    assert caught.value.code == code
    assert memory.latest is before


@pytest.mark.threat("LOG-4")
def test_a_fork_is_seen_with_either_histories_proof(log: Any) -> None:
    memory = memory_at(log, 200)
    for tree in (log.store, log.fork):
        with pytest.raises(LogRefused):
            memory.advance(log.note(300, log.fork), ConsistencyProof.build(tree, 200, 300))


@pytest.mark.threat("LOG-4")
def test_a_forged_memory_is_no_memory(log: Any, witnesses: Any) -> None:
    forged = sign_checkpoint(witnesses.keys[0], log.origin, 600, bytes(32))
    with pytest.raises(LogRefused):
        LogMemory(log.origin, log.public, remembered=forged)


@pytest.mark.threat("LOG-3")
def test_a_memory_with_a_quorum_takes_only_witnessed_checkpoints(log: Any, witnesses: Any) -> None:
    memory = LogMemory(log.origin, log.public, remembered=log.note(5), witnesses=witnesses.known, quorum=1)
    proof = ConsistencyProof.build(log.store, 5, 6)
    with pytest.raises(LogRefused, match="0 known witnesses"):
        memory.advance(log.note(6), proof)
    watcher = memory_at(log, 5)
    seen = watcher.advance(log.note(6), proof)
    note = cosign(seen, witnesses.keys[2], witnesses.known[2].name, at=1)
    assert memory.advance(note, proof).witnessed == {"example.com/w2": 1}


@pytest.mark.threat("LOG-5")
def test_a_restored_state_is_seen_at_start(log: Any) -> None:
    outside = log.seen(300)
    check_store(log.store, 300, outside)
    check_store(log.store, 600, outside)
    with pytest.raises(LogRefused) as caught:
        check_store(log.store, 299, outside)
    assert caught.value.code == "log_shrunk"
    with pytest.raises(LogRefused) as caught:
        check_store(log.fork, 600, outside)
    assert caught.value.code == "log_forked"


def test_a_consistency_proof_between_two_logs_is_refused(log: Any, witnesses: Any) -> None:
    key = witnesses.keys[0]
    note = sign_checkpoint(key, "example.com/other", 10, merkle.root(log.store, 10))
    other = Checkpoint.verify(note, "example.com/other", key.verifying_key.ed25519)
    with pytest.raises(LogRefused, match="different logs"):
        ConsistencyProof.build(log.store, 5, 10).verify(log.seen(5), other)
