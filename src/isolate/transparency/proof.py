"""Proofs as values, and the memory of a client that refuses a fork or a shrink (docs/spec/log.md, 4 and 5).

    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.transparency.checkpoint import sign_checkpoint
    >>> key, store, origin = SigningKey.generate(), merkle.MemoryStore(), "example.com/log"
    >>> notes = [sign_checkpoint(key, origin, n + 1, merkle.append(store, n, b"entry")) for n in range(3)]
    >>> memory = LogMemory(origin, key.verifying_key.ed25519)
    >>> memory.advance(notes[0]).size
    1
    >>> memory.advance(notes[2], ConsistencyProof.build(store, 1, 3)).size
    3
    >>> memory.advance(notes[1])
    Traceback (most recent call last):
    isolate.errors.LogRefused: the log shows 2 entries, and had 3 before (it was restored ...)

Whatever does not verify is LogRefused, with a code: ``log_forked``, ``log_shrunk``, ``log_inconsistent``, or
``log_refused`` for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from hmac import compare_digest
from typing import Any, Self

from attrs import field, frozen

from isolate.crypto import cbor, merkle
from isolate.errors import LogRefused, MalformedError
from isolate.transparency.checkpoint import Checkpoint, Witness

MAX_PROOF = 4096  # bytes; 64 hashes and two sizes take less
MAX_HASHES = 64


def _read(data: bytes, fields: dict[str, type], what: str) -> dict[str, Any]:
    try:
        value = cbor.record(data, {**fields, "hashes": list, "version": int}, max_size=MAX_PROOF)
    except MalformedError as error:
        raise LogRefused(f"the {what} is malformed: {error.message}") from None
    hashes = value["hashes"]
    if len(hashes) > MAX_HASHES or any(type(one) is not bytes or len(one) != 32 for one in hashes):
        raise LogRefused(f"the {what} is malformed: its hashes are not at most 64 of 32 bytes")
    if value["version"] != 1 or any(value[name] < 0 for name in fields):
        raise LogRefused(f"the {what} is malformed: another version, or a negative number")
    return value


@frozen
class InclusionProof:
    """That one entry is at ``index`` of the tree of ``size`` leaves; ``hashes`` from the leaf's sibling up."""

    index: int
    size: int
    hashes: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def build(cls, store: merkle.TreeStore, index: int, size: int) -> Self:
        """Raises StorageError and UsageError as the tree does."""
        return cls(index, size, tuple(merkle.inclusion_proof(store, index, size)))

    def verify(self, entry: bytes, checkpoint: Checkpoint) -> None:
        """Raise LogRefused unless ``entry`` (the data, not its hash) is in the log at this checkpoint."""
        if self.size != checkpoint.size:
            raise LogRefused(f"the proof is for {self.size} entries, the checkpoint for {checkpoint.size}")
        leaf = merkle.leaf_hash(entry)
        if not merkle.verify_inclusion(self.index, self.size, leaf, self.hashes, checkpoint.root):
            raise LogRefused("this entry is not in the log at that place")

    def encode(self) -> bytes:
        return cbor.encode({"version": 1, "index": self.index, "size": self.size, "hashes": list(self.hashes)})

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises LogRefused."""
        value = _read(data, {"index": int, "size": int}, "inclusion proof")
        return cls(value["index"], value["size"], tuple(value["hashes"]))


@frozen
class ConsistencyProof:
    """That the tree of ``old`` leaves is the beginning of the tree of ``new`` leaves."""

    old: int
    new: int
    hashes: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def build(cls, store: merkle.TreeStore, old: int, new: int) -> Self:
        """Raises StorageError and UsageError as the tree does."""
        return cls(old, new, tuple(merkle.consistency_proof(store, old, new)))

    def verify(self, old: Checkpoint, new: Checkpoint) -> None:
        """Raise LogRefused unless the log at ``new`` only added to what it was at ``old``."""
        if old.origin != new.origin:
            raise LogRefused("the two checkpoints are of different logs")
        if (self.old, self.new) != (old.size, new.size):
            raise LogRefused(
                f"the proof leads from {self.old} to {self.new}, the checkpoints from {old.size} to {new.size}"
            )
        if not merkle.verify_consistency(old.size, new.size, self.hashes, old.root, new.root):
            raise LogRefused(
                f"the log of {new.size} entries does not contain the one of {old.size}", code="log_inconsistent"
            )

    def encode(self) -> bytes:
        return cbor.encode({"version": 1, "old": self.old, "new": self.new, "hashes": list(self.hashes)})

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises LogRefused."""
        value = _read(data, {"old": int, "new": int}, "consistency proof")
        return cls(value["old"], value["new"], tuple(value["hashes"]))


class LogMemory:
    """The last checkpoint that a client, or a witness, believed: it moves forward along proofs only.

    ``latest`` is that checkpoint or None; keep ``latest.text`` (public, but not to be lost) and hand it in as
    ``remembered`` after a restart. The first checkpoint is taken on trust where none is handed in. Without
    witnesses a log can still show two clients two histories, each consistent in itself: they must compare.
    """

    __slots__ = ("_origin", "_public", "_quorum", "_witnesses", "latest")

    def __init__(
        self,
        origin: str,
        public: bytes,
        *,
        remembered: str | None = None,
        witnesses: Sequence[Witness] = (),
        quorum: int = 0,
    ) -> None:
        self._origin, self._public = origin, public
        self._witnesses, self._quorum = tuple(witnesses), quorum
        # What was believed once stays believed when the quorum is raised later.
        self.latest = None if remembered is None else Checkpoint.verify(remembered, origin, public)

    def advance(self, text: str | bytes, proof: ConsistencyProof | None = None) -> Checkpoint:
        """Believe a newer checkpoint, or raise LogRefused and stay where we were.

        ``proof`` leads from ``latest.size`` to the new size; equal sizes and a first checkpoint take none.
        """
        new = Checkpoint.verify(text, self._origin, self._public, witnesses=self._witnesses, quorum=self._quorum)
        old = self.latest
        if old is not None:
            if new.size < old.size:
                raise LogRefused(
                    f"the log shows {new.size} entries, and had {old.size} before",
                    code="log_shrunk",
                    hint="it was restored from an old copy, or this is an old answer",
                )
            if new.size == old.size:
                if not compare_digest(new.root, old.root):
                    raise LogRefused(
                        f"the log signed two histories of {new.size} entries",
                        code="log_forked",
                        hint="keep both checkpoints: together they prove it",
                    )
            elif proof is None:
                raise LogRefused(f"no proof leads from {old.size} to {new.size} entries")
            else:
                proof.verify(old, new)
        self.latest = new
        return new


def check_store(store: merkle.TreeStore, size: int, checkpoint: Checkpoint) -> None:
    """Raise LogRefused unless a log's own store of ``size`` leaves contains what it once signed.

    The service does this before it serves, with a checkpoint that is kept outside its state.
    """
    if size < checkpoint.size:
        raise LogRefused(
            f"the state holds {size} entries, and {checkpoint.size} were signed",
            code="log_shrunk",
            hint="this state is an old copy",
        )
    if not compare_digest(merkle.root(store, checkpoint.size), checkpoint.root):
        raise LogRefused(
            f"the first {checkpoint.size} entries of the state are not those that were signed", code="log_forked"
        )
