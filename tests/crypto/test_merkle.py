"""RFC 6962 trees: known roots, a naive second implementation, and every proof of every small tree."""

from __future__ import annotations

import hashlib
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolate.crypto import merkle
from isolate.errors import StorageError, UsageError

# The leaves and roots that Certificate Transparency's implementations share (provenance in the vectors' README).
LEAVES = [
    "",
    "00",
    "10",
    "2021",
    "3031",
    "40414243",
    "5051525354555657",
    "606162636465666768696a6b6c6d6e6f",
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]

SMALL = 40
ENTRIES = tuple(b"entry %d" % number for number in range(SMALL))


@cache
def naive_root(entries: tuple[bytes, ...]) -> bytes:
    """MTH, word for word from RFC 6962, 2.1."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = 1
    while k * 2 < len(entries):
        k *= 2
    return hashlib.sha256(b"\x01" + naive_root(entries[:k]) + naive_root(entries[k:])).digest()


def naive_path(m: int, entries: tuple[bytes, ...]) -> list[bytes]:
    """PATH, word for word from RFC 6962, 2.1.1."""
    if len(entries) == 1:
        return []
    k = 1
    while k * 2 < len(entries):
        k *= 2
    if m < k:
        return [*naive_path(m, entries[:k]), naive_root(entries[k:])]
    return [*naive_path(m - k, entries[k:]), naive_root(entries[:k])]


def naive_subproof(m: int, entries: tuple[bytes, ...], whole: bool) -> list[bytes]:
    """SUBPROOF, word for word from RFC 6962, 2.1.2."""
    if m == len(entries):
        return [] if whole else [naive_root(entries)]
    k = 1
    while k * 2 < len(entries):
        k *= 2
    if m <= k:
        return [*naive_subproof(m, entries[:k], whole), naive_root(entries[k:])]
    return [*naive_subproof(m - k, entries[k:], False), naive_root(entries[:k])]


@pytest.fixture(scope="module")
def tree() -> merkle.MemoryStore:
    store = merkle.MemoryStore()
    assert merkle.extend(store, 0, ENTRIES) == SMALL
    return store


def test_known_roots() -> None:
    store = merkle.MemoryStore()
    assert merkle.root(store, 0).hex() == ROOTS[0]
    for size, leaf in enumerate(LEAVES):
        assert merkle.append(store, size, bytes.fromhex(leaf)).hex() == ROOTS[size + 1]


def test_known_proofs() -> None:
    store = merkle.MemoryStore()
    merkle.extend(store, 0, [bytes.fromhex(leaf) for leaf in LEAVES])
    assert [value.hex() for value in merkle.inclusion_proof(store, 5, 8)] == [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]
    assert [value.hex() for value in merkle.consistency_proof(store, 6, 8)] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]


def test_every_root_and_proof_of_small_trees_is_the_naive_one(tree: merkle.MemoryStore) -> None:
    for size in range(SMALL + 1):
        assert merkle.root(tree, size) == naive_root(ENTRIES[:size])
        for index in range(size):
            assert merkle.inclusion_proof(tree, index, size) == naive_path(index, ENTRIES[:size])
        for old in range(1, size + 1):
            assert merkle.consistency_proof(tree, old, size) == naive_subproof(old, ENTRIES[:size], True)


def test_every_proof_of_small_trees_verifies_where_it_belongs_and_nowhere_else(tree: merkle.MemoryStore) -> None:
    for size in range(1, 18):
        root = merkle.root(tree, size)
        for index in range(size):
            proof = merkle.inclusion_proof(tree, index, size)
            for claimed in range(size + 2):
                leaf = merkle.leaf_hash(ENTRIES[index])
                assert merkle.verify_inclusion(claimed, size, leaf, proof, root) == (claimed == index)
        for old in range(size + 1):
            proof = merkle.consistency_proof(tree, old, size)
            for claimed in range(size + 2):
                accepted = merkle.verify_consistency(claimed, size, proof, merkle.root(tree, old), root)
                assert accepted == (claimed == old)


@pytest.mark.threat("LOG-1")
@given(st.data())
def test_a_changed_proof_is_refused(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, SMALL))
    index = data.draw(st.integers(0, size - 1))
    old = data.draw(st.integers(1, size - 1))
    store = merkle.MemoryStore()
    merkle.extend(store, 0, ENTRIES[:size])
    root, old_root = merkle.root(store, size), merkle.root(store, old)
    leaf = merkle.leaf_hash(ENTRIES[index])
    change = data.draw(st.sampled_from(["flip", "drop", "add", "swap", "cut"]))

    def damaged(proof: list[bytes]) -> list[bytes]:
        where = data.draw(st.integers(0, len(proof) - 1))
        if change == "flip":
            bit = data.draw(st.integers(0, 255))
            number = int.from_bytes(proof[where], "big") ^ (1 << bit)
            return [*proof[:where], number.to_bytes(32, "big"), *proof[where + 1 :]]
        if change == "drop":
            return proof[:where] + proof[where + 1 :]
        if change == "add":
            return [*proof[:where], data.draw(st.sampled_from([bytes(32), root, leaf])), *proof[where:]]
        if change == "swap":
            return proof[::-1] if proof[::-1] != proof else proof[:-1]
        return [*proof[:where], proof[where][:-1], *proof[where + 1 :]]

    inclusion = damaged(merkle.inclusion_proof(store, index, size))
    assert not merkle.verify_inclusion(index, size, leaf, inclusion, root)
    consistency = damaged(merkle.consistency_proof(store, old, size))
    assert not merkle.verify_consistency(old, size, consistency, old_root, root)


@pytest.mark.threat("LOG-1")
def test_a_leaf_cannot_pose_as_a_node() -> None:
    store = merkle.MemoryStore()
    merkle.extend(store, 0, [b"a", b"b"])
    forged = merkle.leaf_hash(b"a") + merkle.leaf_hash(b"b")
    assert not merkle.verify_inclusion(0, 1, merkle.leaf_hash(forged), [], merkle.root(store, 2))


def test_hostile_numbers_are_refused_without_an_exception() -> None:
    root = bytes(32)
    for index, size in [(-1, 1), (0, 0), (3, 1), (0, -1), (0, 1 << 80), (1 << 80, 1 << 81)]:
        assert not merkle.verify_inclusion(index, size, root, [], root)
        assert not merkle.verify_consistency(index, size, [], root, root)
    assert not merkle.verify_inclusion(1, 1, root, [], root)
    assert not merkle.verify_inclusion(0, 2, root, [bytes(32)] * 10_000, root)
    assert not merkle.verify_consistency(1, 2, [bytes(32)] * 10_000, root, root)
    assert not merkle.verify_consistency(0, 5, [], bytes(32), root)
    assert not merkle.verify_consistency(3, 5, [], root, root)


def test_misuse_and_a_damaged_store_are_typed_errors(tree: merkle.MemoryStore) -> None:
    for call in (
        lambda: merkle.root(tree, -1),
        lambda: merkle.inclusion_proof(tree, 5, 5),
        lambda: merkle.inclusion_proof(tree, -1, 5),
        lambda: merkle.consistency_proof(tree, 6, 5),
        lambda: merkle.append(tree, merkle.MAX_SIZE + 1, b""),
    ):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(StorageError, match="lacks node 0 of level 6"):
        merkle.root(tree, 64)


class Counting(merkle.MemoryStore):
    """Counts what an append reads and writes."""

    touched = 0

    def get(self, level: int, index: int) -> bytes | None:
        self.touched += 1
        return super().get(level, index)

    def put(self, level: int, index: int, value: bytes) -> None:
        self.touched += 1
        super().put(level, index, value)


def test_an_append_touches_a_logarithm_of_the_tree() -> None:
    store = Counting()
    size, bound = 0, 0
    for size in range(2000):
        store.touched = 0
        merkle.append(store, size, b"x")
        bound = max(bound, store.touched)
    assert bound <= 3 * size.bit_length()


@pytest.mark.threat("LOG-1")
def test_a_consistency_proof_holds_for_its_two_roots_only(tree: merkle.MemoryStore) -> None:
    for old in range(1, 17):
        proof = merkle.consistency_proof(tree, old, 17)
        roots = merkle.root(tree, old), merkle.root(tree, 17)
        assert merkle.verify_consistency(old, 17, proof, *roots)
        assert not merkle.verify_consistency(old, 17, proof, bytes(32), roots[1])
        assert not merkle.verify_consistency(old, 17, proof, roots[0], bytes(32))


@pytest.mark.threat("LOG-1")
def test_the_border_between_two_hashes_cannot_be_moved(tree: merkle.MemoryStore) -> None:
    left, right = merkle.leaf_hash(ENTRIES[0]), merkle.leaf_hash(ENTRIES[1])
    root = merkle.root(tree, 2)
    assert merkle.verify_inclusion(0, 2, left, [right], root)
    assert not merkle.verify_inclusion(0, 2, left[:-1], [left[-1:] + right], root)
