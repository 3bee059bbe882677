"""The service's transparency log over its database: append, checkpoint, proofs.

    >>> public_entry("release", 1_700_000_000, bytes(32), b"details").hex()[:2]
    'a3'

An entry shows a kind, a time and a salted commitment to its details; the details and the salt stay with the
service, for the owner. Spec: docs/spec/log.md.
"""

from __future__ import annotations

import secrets
import sqlite3
from typing import Any

from isolate.crypto import cbor, merkle
from isolate.errors import UsageError
from isolate.messages.base import MAX_MESSAGE
from isolate.messages.owner import Entries, EntriesRequest, LogAnswer, LogRequest
from isolate.messages.receipts import commitment
from isolate.service.state import State
from isolate.transparency.checkpoint import sign_checkpoint

_AROUND = 80  # bytes of an opened entry's salt, names and heads


def public_entry(kind: str, time: int, salt: bytes, details: bytes) -> bytes:
    """The bytes of a leaf. ``time`` is Unix seconds, ``salt`` 32 bytes."""
    return cbor.encode({"kind": kind, "time": time, "commitment": commitment(salt, details)})


class _Nodes:
    """merkle.TreeStore over the table of nodes, inside somebody's transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def get(self, level: int, index: int) -> bytes | None:
        row = self._database.execute("SELECT hash FROM node WHERE level = ? AND idx = ?", (level, index)).fetchone()
        return None if row is None else bytes(row[0])

    def put(self, level: int, index: int, value: bytes) -> None:
        self._database.execute("INSERT INTO node VALUES (?, ?, ?)", (level, index, value))


class Log:
    def __init__(self, state: State) -> None:
        self._state = state

    @property
    def origin(self) -> str:
        """The name on the checkpoint's first line."""
        return self._state.certificate.origin

    def append(self, database: sqlite3.Connection, kind: str, details: dict[str, Any]) -> int:
        """Append within the caller's transaction; answers the index."""
        index = self._size(database)
        encoded, salt, now = cbor.encode(details), secrets.token_bytes(32), self._state.clock()
        public = public_entry(kind, now, salt, encoded)
        merkle.extend(_Nodes(database), index, (public,))
        database.execute("INSERT INTO entry VALUES (?, ?, ?, ?)", (index, public, salt, encoded))
        return index

    def refused(
        self,
        database: sqlite3.Connection,
        kind: str,
        subject: bytes,
        code: str,
        details: dict[str, Any],
        *,
        times: int = 1,
    ) -> int:
        """Log the 1st, 2nd, 4th, 8th ... refusal of this code for this subject, with its number; answers that.

        Whoever is refused can come again as often as he likes: the log grows with the logarithm of it. Of ``times``
        refusals at once there is one entry, if one of them is such a one.
        """
        (count,) = database.execute(
            "INSERT INTO refused VALUES (?, ?, ?) ON CONFLICT (subject, code) DO UPDATE SET "
            "count = count + excluded.count RETURNING count",
            (subject, code, times),
        ).fetchone()
        if count.bit_length() > (count - times).bit_length():
            self.append(database, kind, {**details, "code": code, "count": count})
        return int(count)

    @staticmethod
    def opened(database: sqlite3.Connection, index: int) -> tuple[bytes, bytes, bytes]:
        """An entry that is there: its public bytes, and the salt and the details that it commits to."""
        row = database.execute("SELECT public, salt, details FROM entry WHERE idx = ?", (index,)).fetchone()
        public, salt, details = map(bytes, row)
        return public, salt, details

    @staticmethod
    def _size(database: sqlite3.Connection) -> int:
        (last,) = database.execute("SELECT max(idx) FROM entry").fetchone()
        return 0 if last is None else int(last) + 1

    def tree(self, database: sqlite3.Connection) -> tuple[merkle.TreeStore, int]:
        """The hashes of the log and its size, for use inside the caller's transaction."""
        return _Nodes(database), self._size(database)

    def entries(self, request: EntriesRequest) -> Entries:
        """What opens the entries, for the owner: as many as an answer holds."""
        found: list[dict[str, bytes]] = []
        with self._state.transaction() as database:
            rows = database.execute(
                "SELECT public, salt, details FROM entry WHERE idx >= ? ORDER BY idx LIMIT ?",
                (min(request.start, 2**63 - 1), request.most),
            )
            size = 0
            for public, salt, details in rows:
                size += len(public) + len(details) + _AROUND
                if found and size > MAX_MESSAGE // 2:
                    break
                found.append({"public": bytes(public), "salt": bytes(salt), "details": bytes(details)})
        return Entries(found)

    def checkpoint(self) -> str:
        """The signed checkpoint of now."""
        with self._state.transaction() as database:
            nodes, size = self.tree(database)
            return sign_checkpoint(self._state.log_key, self.origin, size, merkle.root(nodes, size))

    def answer(self, request: LogRequest) -> LogAnswer:
        """A checkpoint of now, and what was asked to be proved against it. Anyone may ask."""
        with self._state.transaction() as database:
            size, nodes = self._size(database), _Nodes(database)
            if request.old_size > size or (request.index is not None and not 0 <= request.index < size):
                raise UsageError(f"the log has {size} entries")
            checkpoint = sign_checkpoint(self._state.log_key, self.origin, size, merkle.root(nodes, size))
            consistency = merkle.consistency_proof(nodes, request.old_size, size) if request.old_size else []
            if request.index is None:
                return LogAnswer(checkpoint, consistency, None, [])
            row = database.execute("SELECT public FROM entry WHERE idx = ?", (request.index,)).fetchone()
            inclusion = merkle.inclusion_proof(nodes, request.index, size)
            return LogAnswer(checkpoint, consistency, bytes(row[0]), inclusion)
