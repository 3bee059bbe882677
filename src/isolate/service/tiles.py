"""The log for outsiders: C2SP tlog-tiles over HTTP GET, out of the service's database (docs/spec/log.md, 6.1).

    /log/checkpoint              the signed checkpoint of now, as text
    /log/tile/<L>/<N>[.p/<W>]    hashes
    /log/tile/entries/<N>[.p/<W>]

Anyone may read it: an entry shows a kind, a time and a commitment. What is served is believed by nobody before it
agrees with the checkpoint, so it may lie in any cache between.
"""

from __future__ import annotations

from attrs import frozen

from isolate.errors import IsolateError, LogRefused, UnavailableError
from isolate.service.log import Log
from isolate.service.state import State
from isolate.transparency.tiles import WIDTH, Tile, bundle_bytes, tile_bytes

_FOR_EVER = "public, max-age=31536000, immutable"


@frozen
class File:
    """What is answered: a status, a media type, how long it may be kept, and the bytes."""

    status: int
    media_type: str
    cache: str
    body: bytes


class Tiles:
    def __init__(self, state: State, log: Log) -> None:
        self._state = state
        self._log = log

    def answer(self, path: str) -> File:
        """The file at ``path`` below /log/. Never raises what the library raises: 404 or 503 instead."""
        try:
            if path == "checkpoint":
                return File(200, "text/plain; charset=utf-8", "no-cache", self._log.checkpoint().encode())
            return File(200, "application/octet-stream", _FOR_EVER, self._tile(Tile.parse(path)))
        except UnavailableError:
            return File(503, "text/plain; charset=utf-8", "no-store", b"the log cannot be read now\n")
        except IsolateError:
            return File(404, "text/plain; charset=utf-8", "no-store", b"the log has no such file\n")

    def _tile(self, tile: Tile) -> bytes:
        """Raises LogRefused or UsageError for what the log does not have yet."""
        with self._state.transaction() as database:
            if tile.level is not None:
                return tile_bytes(self._log.tree(database)[0], tile)
            first = tile.index * WIDTH
            rows = database.execute(
                "SELECT public FROM entry WHERE idx >= ? AND idx < ? ORDER BY idx", (first, first + tile.width)
            ).fetchall()
        if len(rows) != tile.width:
            raise LogRefused("the log does not have these entries yet")
        return bundle_bytes([bytes(row[0]) for row in rows])
