"""The state of a service: its keys and one SQLite database with full sync, open to one writer.

    >>> import tempfile
    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.service.state import State, create
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     owner = SigningKey.generate()
    ...     _ = create(folder, owner=owner, name="demo", lineage="demo", recovery=[], now=1_700_000_000)
    ...     with State(folder, clock=lambda: 1_700_000_001) as state:
    ...         state.certificate.name
    'demo'

Everything that one request changes is one transaction, its log entry included: what was answered has been
logged, and what failed has left nothing. The service's keys lie in files that only its user may read; they are
not yet sealed at rest (threat-model.md). Spec: docs/spec/service.md, section 9.
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

from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.signing import SigningKey, VerifyingKey
from isolate.errors import IsolateError, RefusedError, StorageError, UnavailableError, UsageError
from isolate.messages.attest import MAX_RECOVERY, ServiceCertificate
from isolate.service import accounts

CERTIFICATE_LIFETIME = 90 * 24 * 3600  # seconds
_KEYS = ("release", "result", "log")
# Also the origin of the log's checkpoints, so it may hold no space and no plus.
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

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
    time INTEGER NOT NULL);
CREATE TABLE rule (asset TEXT PRIMARY KEY, readers BLOB NOT NULL, writers BLOB NOT NULL);
CREATE TABLE asset (
    asset TEXT, epoch INTEGER, digest BLOB UNIQUE NOT NULL, header BLOB NOT NULL, directory BLOB NOT NULL,
    log_index INTEGER NOT NULL, PRIMARY KEY (asset, epoch));
CREATE TABLE refused (subject BLOB, code TEXT, count INTEGER NOT NULL, PRIMARY KEY (subject, code));
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
    now: int,
) -> ServiceCertificate:
    """Make the state of a new service: fresh keys, certified by the owner's root for 90 days.

    ``name`` is 1 to 64 of A-Z a-z 0-9 . _ -; ``recovery`` are the owner's offline recipients, to whom enclaves
    also seal what they make. ``now`` is Unix seconds. The owner's key is used and not kept. Raises UsageError, and
    StorageError when the folder holds anything already; then nothing half-made is left.
    """
    if not _NAME.fullmatch(name) or not lineage:
        raise UsageError("a service's name is 1 to 64 of A-Z a-z 0-9 . _ -, and its lineage is not empty")
    if len(recovery) > MAX_RECOVERY:
        raise UsageError(f"a service has at most {MAX_RECOVERY} recovery recipients")
    root = Path(folder).absolute()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))  # readable by its user alone
        try:
            certificate = _fill(made, owner=owner, name=name, lineage=lineage, recovery=recovery, now=now)
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
    return certificate


def _fill(
    root: Path, *, owner: SigningKey, name: str, lineage: str, recovery: Sequence[Recipient], now: int
) -> ServiceCertificate:
    (root / "keys").mkdir(mode=0o700)
    identity = Identity.generate()
    identity.save(root / "keys" / "recipient.key")
    keys = {purpose: SigningKey.generate() for purpose in _KEYS}
    for purpose, key in keys.items():
        key.save(root / "keys" / f"{purpose}.key")
    public = {purpose: key.verifying_key.to_bytes() for purpose, key in keys.items()}
    certificate = ServiceCertificate(
        name=name,
        lineage=lineage,
        **public,
        recipient=identity.recipient.raw,
        recovery=[recipient.raw for recipient in recovery],
        not_before=now - 60,
        not_after=now + CERTIFICATE_LIFETIME,
    ).sign(owner)
    with contextlib.closing(sqlite3.connect(root / "state.db")) as database, database:
        database.executescript(_SCHEMA + accounts.SCHEMA)
        database.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [("owner", owner.verifying_key.to_bytes()), ("certificate", certificate.encode())],
        )
    return certificate


def _name_of(error: sqlite3.Error) -> str:
    # Only what SQLite itself refused has a name; the module's own complaints have none.
    return getattr(error, "sqlite_errorname", type(error).__name__)


class State:
    """An opened state. ``clock`` answers Unix seconds.

    Raises StorageError when another process has it open (code ``second_writer``), or when it cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], *, clock: Callable[[], int]) -> None:
        root = Path(folder)
        if not (root / "state.db").is_file():
            raise UsageError(f"{root} holds no service's state", hint="make one with `isolate serve --init`")
        self.clock = clock
        self._turn = threading.RLock()
        self._depth = 0
        with contextlib.ExitStack() as undo:
            self._lock_file = undo.enter_context(_locked(root))
            try:
                self._database = sqlite3.connect(root / "state.db", check_same_thread=False, isolation_level=None)
                undo.callback(self._database.close)
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute("PRAGMA synchronous=FULL")
                self._load(root / "keys")
            except sqlite3.Error as error:
                raise StorageError(f"the state could not be read: {_name_of(error)}") from None
            undo.pop_all()

    def _load(self, keys: Path) -> None:
        self.identity = Identity.load(keys / "recipient.key")
        self.release_key, self.result_key, self.log_key = (
            SigningKey.load(keys / f"{purpose}.key") for purpose in _KEYS
        )
        self.owner = VerifyingKey.from_bytes(self._meta("owner"))
        certificate = ServiceCertificate.parse(self._meta("certificate"))
        self.certificate = certificate.verify(self.owner, certificate.lineage)
        mine = [key.verifying_key.to_bytes() for key in (self.release_key, self.result_key, self.log_key)]
        if [certificate.release, certificate.result, certificate.log, certificate.recipient] != [
            *mine,
            self.identity.recipient.raw,
        ]:
            raise StorageError("the keys of this state are not those that its certificate names")

    @property
    def name(self) -> str:
        return self.certificate.name

    def _meta(self, key: str) -> bytes:
        row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise StorageError(f"the state lacks its {key}")
        return bytes(row[0])

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer at a time; committed and synced at the end, rolled back on any exception.

        Inside another of the same thread it is a savepoint: an exception undoes what was done within it, and
        nothing counts before the outermost has committed. Raises StorageError when it cannot be written.
        """
        with self._turn:
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
