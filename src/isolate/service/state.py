"""The state of a service: its keys and one SQLite database with full sync, open to one writer.

    >>> import tempfile
    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.sealed.recipients import Passphrase
    >>> from isolate.service.state import State, create
    >>> owner, unlock = SigningKey.generate(), Passphrase("correct horse", memory=64, passes=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = {"name": "demo", "lineage": "demo", "recovery": [], "unlock": unlock, "epoch": 1}
    ...     _ = create(folder, owner=owner, now=1_700_000_000, **made)
    ...     with State(folder, unlock=unlock, clock=lambda: 1_700_000_001) as state:
    ...         state.certificate.audience
    'demo/1'

Everything that one request changes is one transaction, its log entry included: what was answered has been
logged, and what failed has left nothing. The keys are sealed (isolate.service.keyring); what else is secret lies in
the database in boxes that only they open. Spec: docs/spec/service.md, section 9.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

from isolate.crypto import cbor
from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey, VerifyingKey
from isolate.errors import IsolateError, RefusedError, StorageError, UnavailableError, UsageError
from isolate.messages.attest import MAX_RECOVERY, ServiceCertificate
from isolate.service import accounts, approvals, derived
from isolate.service.keyring import Keyring, Unlock

# Also part of the origin of the log's checkpoints, so it may hold no space, no plus and no slash.
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

VERSION = 1  # of the schema below
TURN = 10.0  # seconds that a request waits for the one before it
MAX_BEHIND = 60  # seconds that the clock may be behind the last entry of the log when the state is opened

# How a transaction begins, ends and is undone: a whole one, and one inside another.
_WHOLE = ("BEGIN IMMEDIATE", "COMMIT", ("ROLLBACK",))
_SAVEPOINT = ("SAVEPOINT step", "RELEASE step", ("ROLLBACK TO step", "RELEASE step"))

C = TypeVar("C")
T = TypeVar("T")

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE policy (sequence INTEGER PRIMARY KEY, signed BLOB NOT NULL);
CREATE TABLE seen (nonce BLOB PRIMARY KEY);
CREATE TABLE slot (
    job TEXT, rank INTEGER, generation INTEGER NOT NULL, instance BLOB NOT NULL, PRIMARY KEY (job, rank));
CREATE TABLE instance (
    instance BLOB PRIMARY KEY, envelope BLOB NOT NULL, keys BLOB NOT NULL, measurement TEXT NOT NULL,
    kind TEXT NOT NULL, registers BLOB NOT NULL, time INTEGER NOT NULL);
CREATE TABLE rule (asset TEXT PRIMARY KEY, readers BLOB NOT NULL, writers BLOB NOT NULL);
CREATE TABLE asset (
    asset TEXT, epoch INTEGER, digest BLOB UNIQUE NOT NULL, header BLOB NOT NULL, directory BLOB NOT NULL,
    log_index INTEGER NOT NULL, PRIMARY KEY (asset, epoch));
CREATE TABLE refused (subject BLOB, code TEXT, count INTEGER NOT NULL, PRIMARY KEY (subject, code));
CREATE TABLE head (asset TEXT PRIMARY KEY, digest BLOB NOT NULL);
CREATE TABLE entry (idx INTEGER PRIMARY KEY, public BLOB NOT NULL, salt BLOB NOT NULL, details BLOB NOT NULL);
CREATE TABLE node (level INTEGER, idx INTEGER, hash BLOB NOT NULL, PRIMARY KEY (level, idx)) WITHOUT ROWID;
"""


def create(
    folder: str | os.PathLike[str],
    *,
    owner: SigningKey,
    name: str,
    lineage: str,
    recovery: Sequence[Recipient],
    unlock: Unlock,
    now: int,
    epoch: int | None = None,
) -> ServiceCertificate:
    """Make the state of a new service: fresh keys, certified by the owner's root for 90 days.

    ``name`` is 1 to 64 of A-Z a-z 0-9 . _ -; ``recovery`` are the owner's offline recipients, to whom enclaves
    also seal what they make, and the service's keys are sealed too; ``unlock`` is what opens those keys at each
    start. ``now`` is Unix seconds, and the first ``epoch`` unless another is given: so a service that is made again
    under a name takes nothing that was signed for the one before. The owner's key is used and not kept. Raises
    UsageError, and StorageError when the folder holds anything already; then nothing half-made is left.
    """
    if not _NAME.fullmatch(name) or not lineage:
        raise UsageError("a service's name is 1 to 64 of A-Z a-z 0-9 . _ -, and its lineage is not empty")
    if len(recovery) > MAX_RECOVERY:
        raise UsageError(f"a service has at most {MAX_RECOVERY} recovery recipients")
    root = Path(folder).absolute()
    public = [recipient.raw for recipient in recovery]
    first = now if epoch is None else epoch
    keys = Keyring.generate(owner, name=name, lineage=lineage, recovery=public, epoch=first, now=now)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))  # readable by its user alone
        try:
            keys.save(made, owner=owner, unlock=unlock)
            with contextlib.closing(sqlite3.connect(made / "state.db")) as database, database:
                # In one transaction: outside of any, each table waits for the disk by itself.
                tables = (_SCHEMA, accounts.SCHEMA, approvals.SCHEMA, derived.SCHEMA)
                database.executescript("\n".join(("BEGIN;", *tables)))
                database.execute(f"PRAGMA user_version = {VERSION}")
                meta = [("owner", owner.verifying_key.to_bytes()), ("epoch", str(first).encode())]
                meta.append(("certificate", keys.certificate.digest))
                database.executemany("INSERT INTO meta VALUES (?, ?)", meta)
            # Onto an empty folder this succeeds; onto anything else it does not.
            made.rename(root)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except sqlite3.Error as error:
        raise StorageError(f"cannot make {root}: {_name_of(error)}") from None
    except OSError as error:
        if root.exists():
            raise StorageError(f"{root} holds a service's state, or something else, already") from None
        raise StorageError(f"cannot make {root}: {error.strerror}") from None
    return keys.certificate


def _name_of(error: sqlite3.Error) -> str:
    # Only what SQLite itself refused has a name; the module's own complaints have none.
    return getattr(error, "sqlite_errorname", type(error).__name__)


class _Clock:
    """A clock that never goes back: what has expired or was logged stays so, whatever the host sets."""

    def __init__(self, clock: Callable[[], int], floor: int) -> None:
        self._clock, self._last = clock, floor

    def __call__(self) -> int:
        self._last = max(self._last, self._clock())
        return self._last

    def skew(self) -> float:
        """By how many seconds the machine's clock is ahead, where that is known (isolate.service.clock)."""
        found: float = getattr(self._clock, "skew", float)()
        return found


class State:
    """An opened state. ``clock`` answers Unix seconds; ``unlock`` opens the keys: what they were made with, or an
    Identity of the owner's offline recovery.

    Raises NoRecipient for the wrong passphrase, and StorageError when another process has it open (code
    ``second_writer``), when the clock is behind the log (``clock_behind``), or when it cannot be read.
    ``recovering`` opens also what a recovery has to mend: the last two, and a recovery that was interrupted.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        unlock: Unlock | Identity,
        clock: Callable[[], int],
        recovering: bool = False,
    ) -> None:
        self.folder = Path(folder)
        if not (self.folder / "state.db").is_file():
            raise UsageError(f"{self.folder} holds no service's state", hint="make one with `isolate serve --init`")
        self._turn = threading.RLock()
        self._depth = 0
        with contextlib.ExitStack() as undo:
            self._lock_file = undo.enter_context(_locked(self.folder))
            try:
                self._database = sqlite3.connect(
                    self.folder / "state.db", check_same_thread=False, isolation_level=None
                )
                undo.callback(self._database.close)
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute("PRAGMA synchronous=FULL")
                (version,) = self._database.execute("PRAGMA user_version").fetchone()
                if version != VERSION:
                    raise StorageError(f"this state is of version {version}, and this program reads {VERSION}")
                self.owner = VerifyingKey.from_bytes(self._meta("owner"))
                self.keys = Keyring.load(self.folder, owner=self.owner, unlock=unlock)
                floor = self._last_time()
                if not recovering:
                    self._check(floor, clock())
                    # Keys that were renewed are in use once they are opened as at each start.
                    if not isinstance(unlock, Identity):
                        self._settle()
            except sqlite3.Error as error:
                raise StorageError(f"the state could not be read: {_name_of(error)}") from None
            undo.pop_all()
        self.clock = _Clock(clock, 0 if recovering else floor)

    def expect(self, certificate: ServiceCertificate) -> None:
        """Say, within the caller's transaction, whose keys will be written next."""
        row = ("certificate/next", certificate.digest)
        self._database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", row)

    def _settle(self) -> None:
        digest = self.certificate.digest
        if self._meta("certificate") != digest:
            with self.transaction() as database:
                database.execute("UPDATE meta SET value = ? WHERE key = 'certificate'", (digest,))
                database.execute("DELETE FROM meta WHERE key = 'certificate/next'")

    def _check(self, floor: int, now: int) -> None:
        rows = self._database.execute("SELECT value FROM meta WHERE key IN ('certificate', 'certificate/next')")
        known = [bytes(row[0]) for row in rows]
        if int(self._meta("epoch")) != self.certificate.epoch or self.certificate.digest not in known:
            raise StorageError(
                "the keys are not those of the rest of this state: one of them is an old copy",
                code="epoch_mixed",
                hint="recover it with `isolate serve --recover`",
            )
        if now < floor - MAX_BEHIND:
            raise StorageError(
                f"the last entry of the log is of {floor}, and this machine says it is {now}",
                code="clock_behind",
                hint="set the clock; if it was wrong before, recover with `isolate serve --recover`",
            )

    def _last_time(self) -> int:
        row = self._database.execute("SELECT public FROM entry ORDER BY idx DESC LIMIT 1").fetchone()
        return int(cbor.decode(bytes(row[0]))["time"]) if row else 0

    @property
    def certificate(self) -> ServiceCertificate:
        return self.keys.certificate

    @property
    def release_key(self) -> SigningKey:
        return self.keys.release

    @property
    def result_key(self) -> SigningKey:
        return self.keys.result

    @property
    def log_key(self) -> SigningKey:
        return self.keys.log

    @property
    def name(self) -> str:
        return self.certificate.name

    @property
    def audience(self) -> str:
        return self.certificate.audience

    def secret(self, name: str, make: Callable[[], Secret]) -> Secret:
        """A further secret of the service's, which lies in the database in a box to itself; made when missing."""
        with self.transaction() as database:
            row = database.execute("SELECT value FROM meta WHERE key = ?", (f"box/{name}",)).fetchone()
            if row is not None:
                return self.keys.open(name, bytes(row[0]))
            made = make()
            database.execute("INSERT INTO meta VALUES (?, ?)", (f"box/{name}", self.keys.box(name, made)))
            return made

    def _meta(self, key: str) -> bytes:
        row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise StorageError(f"the state lacks its {key}")
        return bytes(row[0])

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer at a time; committed and synced at the end, rolled back on any exception.

        Inside another of the same thread it is a savepoint: an exception undoes what was done within it, and
        nothing counts before the outermost has committed. Raises StorageError when it cannot be written, and
        (code ``busy``) when those before take longer than 10 s, on a slow disk: then nothing was done.
        """
        with self._taking_turns():
            begin, commit, undo = _SAVEPOINT if self._depth else _WHOLE
            self._depth += 1
            try:
                self._database.execute(begin)
                yield self._database
                self._database.execute(commit)
            except BaseException as error:
                # When even this fails, the next BEGIN does too, and nothing is answered any more.
                with contextlib.suppress(sqlite3.Error):
                    for statement in undo:
                        self._database.execute(statement)
                if isinstance(error, sqlite3.Error):
                    raise StorageError(f"the state could not be written: {_name_of(error)}") from None
                raise
            finally:
                self._depth -= 1

    @contextmanager
    def _taking_turns(self) -> Iterator[None]:
        if not self._turn.acquire(timeout=TURN):
            raise StorageError("the disk is too slow for what is asked", code="busy", hint="try again")
        try:
            yield
        finally:
            self._turn.release()

    def once(
        self,
        nonce: bytes,
        check: Callable[[sqlite3.Connection], C],
        act: Callable[[sqlite3.Connection, C], T],
    ) -> T:
        """Check, use up the nonce of a signed request, and act: in one transaction, so that nothing moves between.

        Refused by ``check``, the request leaves nothing: nobody burns another's nonce, or fills the table. Refused
        by ``act``, it leaves its used nonce and nothing else. A nonce is never forgotten: a signed request carries
        no time that it would expire by. Raises RefusedError (code ``replayed``), and what both raise.
        """
        with self.transaction() as database:
            checked = check(database)
            try:
                database.execute("INSERT INTO seen VALUES (?)", (nonce,))
            except sqlite3.IntegrityError:
                raise RefusedError("this request was made before", code="replayed") from None
            try:
                with self.transaction():
                    return act(database, checked)
            except UnavailableError:
                raise
            except IsolateError as error:
                refusal = error
        raise refusal

    def close(self) -> None:
        # Whoever is inside a transaction ends it first: SQLite does not survive being closed under a statement.
        with self._turn:
            self._database.close()
        self._lock_file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _locked(root: Path) -> IO[bytes]:
    """The lock file, held. Raises StorageError."""
    try:
        file = (root / "lock").open("wb")
    except OSError as error:
        raise StorageError(f"cannot open {root}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StorageError(f"another service runs on {root}", code="second_writer") from None
    return file
