"""Why a request was refused: kept for the owner, who asks by the id that the refusal carried.

    >>> from isolate.errors import ReleaseRefused
    >>> error = because(4, ReleaseRefused("another holds this slot"), expected="instance 17", found="instance 3")
    >>> [(one["number"], one["name"], one["passed"]) for one in checks_of("release", error)][2:5]
    [(3, 'key', True), (4, 'slot', False), (5, 'measurement', None)]

Who is refused learns a code and one line. The numbered checks of the route, with what was expected and found, stay
here, in a small database of their own beside the state: without sync, since it is no record but a help, and
bounded, since anyone can be refused as often as he likes. Nothing in it is secret: names, digests, times.
Spec: docs/spec/service.md, section 7.3.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from isolate.attestation.appraisal import Check
from isolate.errors import IsolateError, RefusedError, StorageError, UsageError
from isolate.messages.owner import Explanation

KEEP = 4096  # refusals of each class: of callers who got past checks 1 to 3, and of anybody
PRUNE = 256  # refusals between two looks at how many there are
MAX_TEXT = 500  # characters of what was expected or found

# What a request of an enclave passes first: checks 1 to 6 of docs/spec/service.md, section 4.
_ACTING = ("signed", "result", "key", "slot", "measurement", "nonce")
CHECKS: dict[str, tuple[str, ...]] = {
    "release": (*_ACTING, "file", "rule"),
    "register": (*_ACTING, "writer", "epoch"),
    "certify": _ACTING,
    "standing": _ACTING,
    "reserve": (*_ACTING, "token", "invocation", "rule", "revocation", "replay", "accounts"),
    "lease": (*_ACTING, "token", "invocation", "rule", "revocation", "replay", "accounts"),
    "settle": (*_ACTING, "reservation", "settled", "bytes", "handle"),
}

E = TypeVar("E", bound=IsolateError)


def because(number: int, error: E, *, expected: str, found: str) -> E:
    """The error, with the check of its route that failed."""
    error.checks = (Check(number, "", False, expected[:MAX_TEXT], found[:MAX_TEXT]),)
    return error


@contextmanager
def checking(number: int, expected: str) -> Iterator[None]:
    """What is refused within is refused by this check; its own line says what was found."""
    try:
        yield
    except RefusedError as error:
        if not error.checks:
            because(number, error, expected=expected, found=error.message)
        raise


def checks_of(route: str, error: IsolateError) -> list[dict[str, Any]]:
    """All checks of the route in their order; ``passed`` is null for those that were not reached any more."""
    if len(error.checks) > 1:  # an appraisal evaluates all of its list
        return [_entry(one, one.passed) for one in error.checks]
    names = CHECKS.get(route, _ACTING)
    shown = []
    for failed in error.checks:
        for number in range(1, max(len(names), failed.number) + 1):
            name = names[number - 1] if number <= len(names) else ""
            if number == failed.number:
                shown.append(_entry(Check(number, name, False, failed.expected, failed.found), False))
            else:
                shown.append(_entry(Check(number, name, True, "", ""), True if number < failed.number else None))
    return shown


def _entry(check: Check, passed: bool | None) -> dict[str, Any]:
    found = {"number": check.number, "name": check.name, "passed": passed}
    return found | {"expected": check.expected[:MAX_TEXT], "found": check.found[:MAX_TEXT]}


def _is_known(error: IsolateError) -> bool:
    """Whether strangers cannot make it: evidence of a genuine platform, or a request under an attested key."""
    if len(error.checks) > 1:
        return all(one.passed for one in error.checks if one.name in ("simulated", "authentic", "binding"))
    return any(one.number > 3 for one in error.checks)


class Explanations:
    """``folder``: of the state. Keeping never fails what it explains: a full disk only leaves it unexplained."""

    def __init__(self, folder: Path) -> None:
        self._turn = threading.Lock()
        self._kept = {True: 0, False: 0}
        try:
            self._database = sqlite3.connect(folder / "explain.db", check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA synchronous=OFF")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS refusal (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, "
                "known INTEGER NOT NULL, explanation BLOB NOT NULL)"
            )
            self._database.execute("CREATE INDEX IF NOT EXISTS of_class ON refusal (known, number)")
        except sqlite3.Error:
            raise StorageError(
                f"{folder / 'explain.db'} cannot be read", hint="remove it: it is only a help"
            ) from None

    def keep(self, request_id: str, time: int, route: str, error: IsolateError) -> None:
        said = (error.code, error.message[:MAX_TEXT])
        explanation = Explanation(request_id, time, route, *said, checks_of(route, error)).encode()
        known = _is_known(error)
        with self._turn, contextlib.suppress(sqlite3.Error):
            self._database.execute(
                "INSERT INTO refusal (id, known, explanation) VALUES (?, ?, ?)", (request_id, known, explanation)
            )
            self._kept[known] += 1
            if self._kept[known] % PRUNE == 0:
                # The oldest that stays is looked up in the index, and what lies before it goes.
                row = self._database.execute(
                    "SELECT number FROM refusal WHERE known = ? ORDER BY number DESC LIMIT 1 OFFSET ?",
                    (known, KEEP - 1),
                ).fetchone()
                if row is not None:
                    self._database.execute("DELETE FROM refusal WHERE known = ? AND number < ?", (known, row[0]))

    def find(self, request_id: str) -> Explanation:
        """Raises UsageError when nothing is known of it (any more)."""
        with self._turn:
            try:
                row = self._database.execute(
                    "SELECT explanation FROM refusal WHERE id = ?", (request_id,)
                ).fetchone()
            except sqlite3.Error:
                raise StorageError("explain.db cannot be read") from None
        if row is None:
            raise UsageError("no refusal of this id is known here", hint="the service keeps the last few thousand")
        return Explanation.parse(bytes(row[0]))

    def close(self) -> None:
        with self._turn:
            self._database.close()


def text(value: Any) -> str:
    """A digest in hex, shortened; anything else as it prints."""
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 32 else f"{value.hex()[:64]}..."
    return str(value)
