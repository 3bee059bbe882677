"""Tiles: the paths and widths of the specification, and an auditor who needs nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolate.crypto import merkle
from isolate.errors import LogRefused, UsageError
from isolate.transparency import Tile, TileStore, tile_bytes
from isolate.transparency.tiles import bundle_bytes, parse_bundle, tiles_of


def test_the_examples_of_the_specification() -> None:
    assert Tile(0, 1234067).path == "tile/0/x001/x234/067"
    tiles = list(tiles_of(70_000))
    assert [(t.level, t.width, sum(1 for u in tiles if u.level == t.level)) for t in tiles if t.width < 256] == [
        (0, 112, 274),
        (1, 17, 2),
        (2, 1, 1),
    ]
    assert [tile.path for tile in tiles_of(256)] == ["tile/0/000", "tile/1/000.p/1"]
    assert list(tiles_of(0)) == []


@given(level=st.none() | st.integers(0, 7), index=st.integers(0, 2**54), width=st.integers(1, 256))
def test_a_path_leads_back_to_its_tile(level: int | None, index: int, width: int) -> None:
    tile = Tile(level, index, width)
    assert Tile.parse(tile.path) == tile


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tile/0/0",
        "tile/8/000",
        "tile/00/000",
        "tile/0/x000/001",
        "tile/0/000.p/0",
        "tile/0/000.p/256",
        "tile/0/000.p/01",
        "tile/0/000.p/999",
        "tile/0/001/000",
        "tile/0/000\n",
        "/tile/0/000",
        "tile/../0/000",
        "tile/0/\u0661\u0661\u0661",
        "tile/0/x018/x014/x398/x509/x481/985",  # of leaves that no tree has
        "tile/0/x999/x999/x999/x999/x999/x999/999",
    ],
)
def test_other_spellings_are_refused(path: str) -> None:
    with pytest.raises(LogRefused):
        Tile.parse(path)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 511, 512, 600])
def test_an_auditor_computes_roots_and_proofs_from_tiles_alone(log: Any, size: int) -> None:
    files = {tile.path: tile_bytes(log.store, tile) for tile in tiles_of(size)}
    store = TileStore(files.__getitem__, size)
    assert merkle.root(store, size) == merkle.root(log.store, size)
    for index in {0, size // 2, size - 1}:
        assert merkle.inclusion_proof(store, index, size) == merkle.inclusion_proof(log.store, index, size)
    for old in {1, size // 2 or 1, size}:
        assert merkle.consistency_proof(store, old, size) == merkle.consistency_proof(log.store, old, size)


def test_a_tree_of_three_levels_of_tiles() -> None:
    store, size = merkle.MemoryStore(), 65_536 + 300
    merkle.extend(store, 0, (b"%d" % number for number in range(size)))
    files = {tile.path: tile_bytes(store, tile) for tile in tiles_of(size)}
    fetched: list[str] = []

    def fetch(path: str) -> bytes:
        fetched.append(path)
        return files[path]

    auditor = TileStore(fetch, size)
    proof = merkle.inclusion_proof(auditor, 12_345, size)
    assert merkle.verify_inclusion(12_345, size, merkle.leaf_hash(b"12345"), proof, merkle.root(store, size))
    assert len(fetched) <= 6


@pytest.mark.threat("LOG-6")
@pytest.mark.parametrize(("path", "leaf"), [("tile/0/000", 1), ("tile/0/001", 257), ("tile/0/002.p/88", 513)])
def test_proofs_from_a_false_tile_do_not_verify(log: Any, path: str, leaf: int) -> None:
    files = {tile.path: tile_bytes(log.store, tile) for tile in tiles_of(600)}
    root = merkle.root(TileStore(files.__getitem__, 600), 600)
    for flip in (0, 1):
        changed = files | {path: bytes([files[path][0] ^ flip]) + files[path][1:]}
        proof = merkle.inclusion_proof(TileStore(changed.__getitem__, 600), leaf, 600)
        entry = merkle.leaf_hash(log.entries[leaf])
        assert merkle.verify_inclusion(leaf, 600, entry, proof, root) == (flip == 0)


@pytest.mark.threat("LOG-6")
def test_false_or_short_tiles_give_no_signed_root(log: Any) -> None:
    files = {tile.path: tile_bytes(log.store, tile) for tile in tiles_of(600)}
    top = files | {"tile/1/000.p/2": bytes(64)}
    assert merkle.root(TileStore(top.__getitem__, 600), 600) != merkle.root(log.store, 600)
    short = files | {"tile/0/000": files["tile/0/000"][:-1]}
    with pytest.raises(LogRefused, match="8191 bytes, not 8192"):
        TileStore(short.__getitem__, 600).get(0, 3)


def test_a_bundle_gives_back_its_entries() -> None:
    entries = [b"", b"x", b"y" * 65_535]
    assert parse_bundle(bundle_bytes(entries), 3) == entries


@pytest.mark.parametrize(
    ("data", "width"), [(b"", 1), (b"\x00", 1), (b"\x00\x02x", 1), (b"\x00\x01xy", 1), (b"\x00\x01x", 2)]
)
def test_a_malformed_bundle_is_refused(data: bytes, width: int) -> None:
    with pytest.raises(LogRefused):
        parse_bundle(data, width)


def test_misuse(log: Any) -> None:
    for call in (
        lambda: Tile(8, 0),
        lambda: Tile(0, -1),
        lambda: Tile(0, 0, 0),
        lambda: Tile(0, 0, 257),
        lambda: tile_bytes(log.store, Tile(None, 0)),
        lambda: tile_bytes(log.store, Tile(0, 2, 256)),
        lambda: bundle_bytes([]),
        lambda: bundle_bytes([b"x" * 65_536]),
        lambda: TileStore(lambda path: b"", 10).put(0, 0, bytes(32)),
    ):
        with pytest.raises(UsageError):
            call()
    assert TileStore(lambda path: b"", 10).get(0, 10) is None
