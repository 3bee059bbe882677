"""Merkle trees of RFC 6962 over a store of complete subtrees (docs/spec/log.md, 2).

    >>> from isolate.crypto import merkle
    >>> store, entries = merkle.MemoryStore(), [b"first", b"second", b"third"]
    >>> roots = [merkle.append(store, size, entry) for size, entry in enumerate(entries)]
    >>> proof = merkle.inclusion_proof(store, 1, 3)
    >>> merkle.verify_inclusion(1, 3, merkle.leaf_hash(b"second"), proof, roots[2])
    True
    >>> merkle.verify_consistency(1, 3, merkle.consistency_proof(store, 1, 3), roots[0], roots[2])
    True

The store holds the hash of each *complete* subtree: ``(level, index)`` covers the leaves from ``index << level``
to ``(index + 1) << level``. Such a hash never changes once it is there, so a log that appends only ever adds
rows, and any earlier size can still be proved. An append touches O(log n) of them.

An *entry* is the data of a leaf, of any length; a *leaf* is its hash, 32 bytes like every hash here.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Protocol

from isolate.errors import StorageError, UsageError

HASH_SIZE = 32
MAX_SIZE = 1 << 62  # leaves; a proof then has at most 63 hashes, and a size fits every integer of our formats
EMPTY_ROOT = sha256(b"").digest()


class TreeStore(Protocol):
    """Where the hashes of complete subtrees are kept: a dict, a database table, or tiles that were fetched.

    ``put`` is called once per (level, index), level by level from the leaf upwards. A store that lasts commits
    all of one append together, so that what is signed afterwards can always be proved.
    """

    def get(self, level: int, index: int) -> bytes | None: ...
    def put(self, level: int, index: int, value: bytes) -> None: ...


class MemoryStore:
    """A tree store in a dict."""

    __slots__ = ("_nodes",)

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], bytes] = {}

    def get(self, level: int, index: int) -> bytes | None:
        return self._nodes.get((level, index))

    def put(self, level: int, index: int, value: bytes) -> None:
        self._nodes[level, index] = value


def leaf_hash(entry: bytes) -> bytes:
    """The hash of a leaf: SHA-256(0x00 || entry)."""
    return sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node: SHA-256(0x01 || left || right)."""
    return sha256(b"\x01" + left + right).digest()


def _node(store: TreeStore, level: int, index: int) -> bytes:
    value = store.get(level, index)
    if value is None or len(value) != HASH_SIZE:
        raise StorageError(f"the tree's store lacks node {index} of level {level}", hint="restore it from a copy")
    return value


def _split(count: int) -> int:
    """The greatest power of two below ``count``, which is at least 2."""
    return 1 << (count - 1).bit_length() - 1


def _range(store: TreeStore, start: int, end: int) -> bytes:
    """MTH(D[start:end]) for a range that is a node of some tree; its incomplete part runs down one edge."""
    count = end - start
    if count & (count - 1) == 0:
        level = count.bit_length() - 1
        return _node(store, level, start >> level)
    middle = start + _split(count)
    return node_hash(_range(store, start, middle), _range(store, middle, end))


def _check_size(size: int) -> None:
    if not 0 <= size <= MAX_SIZE:
        raise UsageError(f"a tree has 0 to 2**62 leaves, not {size}")


def extend(store: TreeStore, size: int, entries: Iterable[bytes]) -> int:
    """Append each entry to the tree of ``size`` leaves and return its new size. Amortised two puts per entry."""
    _check_size(size)
    for entry in entries:
        level, index, value = 0, size, leaf_hash(entry)
        store.put(level, index, value)
        while index & 1:
            value = node_hash(_node(store, level, index - 1), value)
            level, index = level + 1, index >> 1
            store.put(level, index, value)
        size += 1
    _check_size(size)
    return size


def append(store: TreeStore, size: int, entry: bytes) -> bytes:
    """Append one entry to the tree of ``size`` leaves and return the new root.

    Raises StorageError if the store lacks what it needs, UsageError for a size that no tree has.
    """
    return root(store, extend(store, size, (entry,)))


def root(store: TreeStore, size: int) -> bytes:
    """The root over the first ``size`` leaves. Raises StorageError, UsageError."""
    _check_size(size)
    return _range(store, 0, size) if size else EMPTY_ROOT


def inclusion_proof(store: TreeStore, index: int, size: int) -> list[bytes]:
    """PATH(index, D[size]) of RFC 6962, 2.1.1: the siblings from the leaf up. Raises StorageError, UsageError."""
    _check_size(size)
    if not 0 <= index < size:
        raise UsageError(f"leaf {index} is not in a tree of {size} leaves")
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_range(store, middle, end))
            end = middle
        else:
            path.append(_range(store, start, middle))
            start = middle
    return path[::-1]


def consistency_proof(store: TreeStore, old: int, new: int) -> list[bytes]:
    """PROOF(old, D[new]) of RFC 6962, 2.1.2; empty if either tree is. Raises StorageError, UsageError."""
    _check_size(new)
    if not 0 <= old <= new:
        raise UsageError(f"a tree of {new} leaves has none of {old} before it")
    if old in (0, new):
        return []
    path: list[bytes] = []
    start, end, whole = 0, new, True
    while end != old:
        middle = start + _split(end - start)
        if old <= middle:
            path.append(_range(store, middle, end))
            end = middle
        else:
            path.append(_range(store, start, middle))
            start, whole = middle, False
    if not whole:
        path.append(_range(store, start, end))
    return path[::-1]


def _well_formed(proof: Sequence[bytes], *roots: bytes) -> bool:
    return len(proof) <= 64 and all(len(value) == HASH_SIZE for value in (*proof, *roots))


def verify_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether ``leaf`` (a leaf *hash*) stands at ``index`` in the tree of ``size`` leaves with this root.

    RFC 9162, 2.1.3.2. Never raises on hostile input.
    """
    if not 0 <= index < size <= MAX_SIZE or not _well_formed(proof, leaf, root):
        return False
    node, last, value = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if node & 1 or node == last:
            value = node_hash(sibling, value)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            value = node_hash(value, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and hmac.compare_digest(value, root)


def verify_consistency(old: int, new: int, proof: Sequence[bytes], old_root: bytes, new_root: bytes) -> bool:
    """Whether the tree of ``old`` leaves with ``old_root`` is the beginning of the one of ``new`` leaves.

    RFC 9162, 2.1.4.2. An empty tree is the beginning of any; its root must be the empty root. Never raises on
    hostile input.
    """
    if not 0 <= old <= new <= MAX_SIZE or not _well_formed(proof, old_root, new_root):
        return False
    if old == 0 and not hmac.compare_digest(old_root, EMPTY_ROOT):
        return False
    if old == new:
        return not proof and hmac.compare_digest(old_root, new_root)
    if old == 0:
        return not proof
    path = list(proof)
    if old & (old - 1) == 0:
        path.insert(0, old_root)
    if not path:
        return False
    node, last = old - 1, new - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    before = after = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if node & 1 or node == last:
            before, after = node_hash(sibling, before), node_hash(sibling, after)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            after = node_hash(after, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and hmac.compare_digest(before, old_root) and hmac.compare_digest(after, new_root)
