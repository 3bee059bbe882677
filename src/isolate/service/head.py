"""The head of the log, kept elsewhere: how a service notices that its own state is an old copy (log.md, 5).

    >>> Head.__name__
    'Head'

A file outside the state holds the last checkpoint. Before anything is served, the state's own tree must contain it.
The newest one is written there when the service starts and stops, and each minute that the log grew. Whoever can
restore that file with the state is not noticed here: it belongs on another machine's disk, or under another's hand.
Clients that remember (``isolate log verify --remember``) notice too, and write the same file.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from isolate.errors import IsolateError, LogRefused
from isolate.service.log import Log
from isolate.service.state import State
from isolate.transparency.checkpoint import Checkpoint
from isolate.transparency.keeping import read_checkpoint, write_checkpoint
from isolate.transparency.proof import check_store

EVERY = 60.0  # seconds between two looks at whether the log grew

log = structlog.get_logger("isolate.service")


class Head:
    """Checks once, then keeps the file while it is open. ``first``: the log began just now, or another epoch of it,
    and the file may not be there yet.

    Raises LogRefused (log_shrunk, log_forked, log_refused, checkpoint_missing) or StorageError: then nothing is
    to be served.
    """

    def __init__(self, state: State, held: Log, path: Path, *, first: bool = False) -> None:
        self._state, self._log, self._path = state, held, path
        self._stop = threading.Event()
        text = read_checkpoint(path)
        if text is not None:
            self._check(text)
        elif not first:
            raise LogRefused(
                f"{path} is not there, so whether this state is an old copy cannot be told",
                code="checkpoint_missing",
                hint="put it back; `isolate log verify --remember FILE` writes the same",
            )
        self._kept = self._write()
        self._thread = threading.Thread(target=self._run, name="head", daemon=True)
        self._thread.start()

    def _check(self, text: str) -> None:
        seen = Checkpoint.verify(text, self._log.origin, self._state.log_key.verifying_key.ed25519)
        with self._state.transaction() as database:
            check_store(*self._log.tree(database), seen)

    def _write(self) -> str:
        text = self._log.checkpoint()
        write_checkpoint(self._path, text)
        return text

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            try:
                if self._log.checkpoint() != self._kept:
                    self._kept = self._write()
            except IsolateError as error:
                # What was kept stays, and is still true: the service goes on.
                log.error("checkpoint.not_kept", code=error.code)

    def close(self) -> None:
        """Write the last one. Raises StorageError."""
        self._stop.set()
        self._thread.join()
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
