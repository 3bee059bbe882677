"""The log as static files: paths and bytes of C2SP tlog-tiles (docs/spec/log.md, 6).

    >>> store = merkle.MemoryStore()
    >>> size = merkle.extend(store, 0, [b"%d" % n for n in range(300)])
    >>> [tile.path for tile in tiles_of(size)]
    ['tile/0/000', 'tile/0/001.p/44', 'tile/1/000.p/1']
    >>> files = {tile.path: tile_bytes(store, tile) for tile in tiles_of(size)}
    >>> merkle.root(TileStore(files.__getitem__, size), size) == merkle.root(store, size)
    True

A tile is 1 to 256 hashes of one level, 32 bytes each; level L of the tiles is level 8L of the tree. An entry
bundle is the data of up to 256 entries, each behind its length (two bytes, big-endian).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from attrs import frozen

from isolate.crypto import merkle
from isolate.errors import LogRefused, UsageError

WIDTH = 256
HEIGHT = 8
MAX_LEVEL = 7  # 256**8 > 2**62 leaves
MAX_INDEX = merkle.MAX_SIZE // WIDTH  # of a tile: what is beyond has no leaves
MAX_ENTRY = 0xFFFF  # bytes, by the length prefix

_PATH = re.compile(r"tile/([0-7]|entries)/((?:x[0-9]{3}/){0,6}[0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?")


@frozen
class Tile:
    """One tile, or (``level`` None) one entry bundle: its index within the level and its width."""

    level: int | None
    index: int
    width: int = WIDTH

    def __attrs_post_init__(self) -> None:
        if self.level is not None and not 0 <= self.level <= MAX_LEVEL:
            raise UsageError("a tile's level is 0 to 7")
        if not 0 <= self.index <= MAX_INDEX or not 1 <= self.width <= WIDTH:
            raise UsageError("a tile has an index of 0 to 2**54 and a width of 1 to 256")

    @property
    def path(self) -> str:
        """Where it is served, below the log's prefix."""
        digits = str(self.index)
        digits = digits.zfill(-(-len(digits) // 3) * 3)
        groups = [digits[start : start + 3] for start in range(0, len(digits), 3)]
        number = "/".join([f"x{group}" for group in groups[:-1]] + groups[-1:])
        level = "entries" if self.level is None else str(self.level)
        return f"tile/{level}/{number}" + ("" if self.width == WIDTH else f".p/{self.width}")

    @classmethod
    def parse(cls, path: str) -> Self:
        """Read such a path. Raises LogRefused for any other, also for another spelling of the same tile."""
        match = _PATH.fullmatch(path)
        if match:
            level, number, width = match.groups()
            index = int(number.replace("x", "").replace("/", ""))
            if index <= MAX_INDEX and int(width or WIDTH) <= WIDTH:
                tile = cls(None if level == "entries" else int(level), index, int(width or WIDTH))
                if tile.path == path:
                    return tile
        raise LogRefused("this is no path of a tile")


def tiles_of(size: int) -> Iterator[Tile]:
    """The tiles of a tree of ``size`` leaves, without the entry bundles; the last of a level may be partial."""
    level = 0
    while size:
        for index in range(size // WIDTH):
            yield Tile(level, index)
        if size % WIDTH:
            yield Tile(level, size // WIDTH, size % WIDTH)
        level, size = level + 1, size // WIDTH


def tile_bytes(store: merkle.TreeStore, tile: Tile) -> bytes:
    """The bytes of a tile, from the same store that the log appends to.

    Raises UsageError for an entry bundle or a tile that the tree does not have yet.
    """
    if tile.level is None:
        raise UsageError("an entry bundle is made of entries, not of the tree")
    hashes: list[bytes] = []
    for index in range(tile.index * WIDTH, tile.index * WIDTH + tile.width):
        value = store.get(tile.level * HEIGHT, index)
        if value is None:
            raise UsageError(f"the tree has no {tile.path} yet")
        hashes.append(value)
    return b"".join(hashes)


def bundle_bytes(entries: Sequence[bytes]) -> bytes:
    """An entry bundle of 1 to 256 entries of at most 65535 bytes each. Raises UsageError."""
    if not 1 <= len(entries) <= WIDTH or any(len(entry) > MAX_ENTRY for entry in entries):
        raise UsageError("a bundle takes 1 to 256 entries of at most 65535 bytes")
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def parse_bundle(data: bytes, width: int) -> list[bytes]:
    """The ``width`` entries of a bundle. Raises LogRefused if it does not hold exactly that many."""
    entries: list[bytes] = []
    position = 0
    while position < len(data) and len(entries) < width:
        end = position + 2 + int.from_bytes(data[position : position + 2], "big")
        if end > len(data) or position + 2 > len(data):
            break
        entries.append(data[position + 2 : end])
        position = end
    if position != len(data) or len(entries) != width:
        raise LogRefused("the entry bundle is malformed")
    return entries


class TileStore:
    """A tree store over fetched tiles, for an auditor who computes proofs or roots without asking the log.

    ``fetch`` maps a path to bytes, and may raise its own errors. Nothing from it is to be believed until a root
    or proof made of it agrees with a verified checkpoint of ``size``.
    """

    __slots__ = ("_fetch", "_nodes", "_size")

    def __init__(self, fetch: Callable[[str], bytes], size: int) -> None:
        self._fetch, self._size = fetch, size
        self._nodes: dict[tuple[int, int], bytes] = {}

    def get(self, level: int, index: int) -> bytes | None:
        """The hash of a complete subtree, or None if the tree is too small. Raises LogRefused."""
        if index < 0 or level < 0 or (index + 1) << level > self._size:
            return None
        if (level, index) not in self._nodes:
            self._load(level // HEIGHT, (index << level % HEIGHT) // WIDTH)
        return self._nodes[level, index]

    def put(self, level: int, index: int, value: bytes) -> None:
        """Refused: fetched tiles are read only."""
        raise UsageError("a log is not appended to through its tiles")

    def _load(self, level: int, number: int) -> None:
        width = min(WIDTH, (self._size >> level * HEIGHT) - number * WIDTH)
        tile = Tile(level, number, width)
        data = self._fetch(tile.path)
        if len(data) != width * merkle.HASH_SIZE:
            raise LogRefused(f"{tile.path} has {len(data)} bytes, not {width * merkle.HASH_SIZE}")
        hashes = [data[start : start + merkle.HASH_SIZE] for start in range(0, len(data), merkle.HASH_SIZE)]
        first = number * WIDTH
        for step in range(HEIGHT):
            for offset, value in enumerate(hashes):
                self._nodes[level * HEIGHT + step, first + offset] = value
            pairs = zip(hashes[::2], hashes[1::2], strict=False)  # an odd last one has no complete parent yet
            hashes = [merkle.node_hash(left, right) for left, right in pairs]
            first //= 2
