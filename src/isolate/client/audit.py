"""Auditing a service's log from its files: nothing the service says is believed that its checkpoint does not show.

    >>> Auditor(lambda path, most: b"", origin="isolate/demo", public=bytes(32)).run()
    Traceback (most recent call last):
    isolate.errors.LogRefused: the checkpoint is no note with 1 to 64 signatures

The audit, in this order (docs/spec/log.md, 6.2):

1. the checkpoint is signed by the pinned log, and cosigned by as many known witnesses as are asked for;
2. it does not show fewer entries than the remembered one, nor another root over as many;
3. a consistency proof, computed from tiles, leads from the remembered one to it;
4. every entry since then is well formed, and hashing them onto the remembered tree gives exactly its root.

Without a remembered checkpoint, 2 and 3 say nothing, and 4 covers the whole log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from hmac import compare_digest

from attrs import frozen

from isolate.crypto import cbor, merkle
from isolate.crypto.signing import VerifyingKey
from isolate.errors import LogRefused, MalformedError
from isolate.messages.receipts import UseReceipt
from isolate.transparency.checkpoint import MAX_NOTE, Checkpoint, Witness
from isolate.transparency.proof import ConsistencyProof, InclusionProof, LogMemory
from isolate.transparency.tiles import MAX_ENTRY, WIDTH, Tile, TileStore, parse_bundle

MAX_BUNDLE = WIDTH * (2 + MAX_ENTRY)
MAX_KIND = 64  # characters

Fetch = Callable[[str, int], bytes]


@frozen
class Report:
    """``checkpoint`` is what to remember now; ``old`` the remembered size; ``kinds`` counts new entries."""

    checkpoint: Checkpoint
    old: int | None  # None when nothing was remembered
    kinds: Mapping[str, int]


class _Edge:
    """A tree store of the last two complete subtrees of each level: all that appending and the root need."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], bytes] = {}

    def get(self, level: int, index: int) -> bytes | None:
        return self._nodes.get((level, index))

    def put(self, level: int, index: int, value: bytes) -> None:
        self._nodes[level, index] = value
        self._nodes.pop((level, index - 2), None)


class Auditor:
    """``fetch`` answers the file at a path below /log/, of at most so many bytes, and may raise its own errors.

    ``shown`` is the last note that verified by itself (check 1), whatever came of it: evidence, if it lied.
    """

    def __init__(
        self,
        fetch: Fetch,
        *,
        origin: str,
        public: bytes,
        remembered: str | None = None,
        witnesses: Sequence[Witness] = (),
        quorum: int = 0,
    ) -> None:
        self._fetch = fetch
        self._pins = {"witnesses": tuple(witnesses), "quorum": quorum}
        self._origin, self._public = origin, public
        self._memory = LogMemory(origin, public, remembered=remembered, witnesses=witnesses, quorum=quorum)
        self.shown: Checkpoint | None = None

    def run(self, progress: Callable[[int], None] | None = None) -> Report:
        """All four checks. ``progress`` is told how many entries were read. Raises LogRefused."""
        note = self._fetch("checkpoint", MAX_NOTE)
        new = self.shown = Checkpoint.verify(note, self._origin, self._public, **self._pins)  # type: ignore[arg-type]
        old = self._memory.latest
        tiles = TileStore(lambda path: self._fetch(path, WIDTH * merkle.HASH_SIZE), new.size)
        proof = None
        if old is not None and new.size > old.size:
            proof = ConsistencyProof.build(tiles, old.size, new.size)
        self._memory.advance(note, proof)
        kinds = self._entries(tiles, old, new, progress)
        return Report(new, None if old is None else old.size, kinds)

    def find(self, receipt: UseReceipt, release_key: VerifyingKey, at: Checkpoint) -> None:
        """Raise LogRefused unless the use of this receipt stands in the log, at a checkpoint that ``run`` found.

        ``release_key``: of the certified service. Raises MalformedError too. Spec: docs/spec/service.md, 6.2.
        """
        # Checked first: what the service did not sign is no proof against it.
        index = receipt.check(release_key).log_index
        if not 0 <= index < at.size:
            raise LogRefused(f"the receipt names entry {index} of a log that has {at.size}", code="log_shrunk")
        tiles = TileStore(lambda path: self._fetch(path, WIDTH * merkle.HASH_SIZE), at.size)
        (entry,) = next(self._bundles(index, index + 1, at.size))
        receipt.verify(release_key, entry, InclusionProof.build(tiles, index, at.size), at)

    def _entries(
        self,
        tiles: TileStore,
        old: Checkpoint | None,
        new: Checkpoint,
        progress: Callable[[int], None] | None,
    ) -> Mapping[str, int]:
        edge, size = _Edge(), 0 if old is None else old.size
        for level in range(size.bit_length()):
            # The tree of this size is one subtree for each bit of it.
            if size >> level & 1 and (value := tiles.get(level, (size >> level) - 1)) is not None:
                edge.put(level, (size >> level) - 1, value)
        kinds: Counter[str] = Counter()
        for entries in self._bundles(size, new.size, new.size):
            kinds.update(_kind(entry, size + number) for number, entry in enumerate(entries))
            size = merkle.extend(edge, size, entries)
            if progress is not None:
                progress(size)
        # False tiles end here too: no other subtrees and entries have this root.
        if not compare_digest(merkle.root(edge, size), new.root):
            raise LogRefused("the entries are not those that the checkpoint is for", code="log_inconsistent")
        return dict(sorted(kinds.items()))

    def _bundles(self, start: int, end: int, size: int) -> Iterator[list[bytes]]:
        """The entries from ``start`` to ``end`` of a log of this size, as they lie in its files."""
        for index in range(start // WIDTH, -(-end // WIDTH)):
            first, width = index * WIDTH, min(WIDTH, size - index * WIDTH)
            data = self._fetch(Tile(None, index, width).path, MAX_BUNDLE)
            yield parse_bundle(data, width)[max(start - first, 0) : end - first]


def _kind(entry: bytes, index: int) -> str:
    """The kind of an entry. Raises LogRefused for one that is not of our form: it could hide anything."""
    try:
        value = cbor.record(entry, {"kind": str, "time": int, "commitment": bytes}, max_size=MAX_ENTRY)
    except MalformedError as error:
        raise LogRefused(f"entry {index} of the log is malformed: {error.message}") from None
    kind: str = value["kind"]
    if not 1 <= len(kind) <= MAX_KIND or not kind.isprintable() or len(value["commitment"]) != 32:
        raise LogRefused(f"entry {index} of the log is malformed")
    return kind
