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

import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.signing import SigningKey, VerifyingKey
from isolate.errors import RefusedError, StorageError, UsageError
from isolate.messages.attest import ServiceCertificate

CERTIFICATE_LIFETIME = 90 * 24 * 3600  # seconds
NONCE_LIFETIME = 300  # seconds: of a challenge, and the age up to which a signed request's nonce is remembered
_KEYS = ("release", "result", "log")

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE policy (sequence INTEGER PRIMARY KEY, signed BLOB NOT NULL);
CREATE TABLE challenge (
    nonce BLOB PRIMARY KEY, job TEXT NOT NULL, rank INTEGER NOT NULL, generation INTEGER NOT NULL,
    expires INTEGER NOT NULL);
CREATE TABLE seen (nonce BLOB PRIMARY KEY);
CREATE TABLE slot (
    job TEXT, rank INTEGER, issued INTEGER NOT NULL, current INTEGER NOT NULL, PRIMARY KEY (job, rank));
CREATE TABLE instance (
    instance BLOB PRIMARY KEY, envelope BLOB NOT NULL, keys BLOB NOT NULL, measurement TEXT NOT NULL,
    time INTEGER NOT NULL);
CREATE TABLE rule (asset TEXT PRIMARY KEY, readers BLOB NOT NULL, writers BLOB NOT NULL);
CREATE TABLE asset (
    asset TEXT, epoch INTEGER, digest BLOB UNIQUE NOT NULL, header BLOB NOT NULL, directory BLOB NOT NULL,
    log_index INTEGER NOT NULL, PRIMARY KEY (asset, epoch));
CREATE TABLE account (handle BLOB PRIMARY KEY, uses INTEGER NOT NULL, bytes_out INTEGER NOT NULL);
CREATE TABLE charged (invocation BLOB PRIMARY KEY);
CREATE TABLE revoked (handle BLOB PRIMARY KEY);
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

    ``recovery`` are the owner's offline recipients, to whom enclaves also seal what they make. ``now`` is Unix
    seconds. Raises StorageError when the folder holds a state already. The owner's key is used and not kept.
    """
    root = Path(folder)
    try:
        (root / "keys").mkdir(parents=True, mode=0o700)
    except FileExistsError:
        raise StorageError(f"{root} holds a service's state already") from None
    except OSError as error:
        raise StorageError(f"cannot make {root}: {error.strerror}") from None
    root.chmod(0o700)
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
        not_before=now - 60,
        not_after=now + CERTIFICATE_LIFETIME,
    ).sign(owner)
    database = sqlite3.connect(root / "state.db")
    with database:
        database.executescript(_SCHEMA)
        database.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [
                ("owner", owner.verifying_key.to_bytes()),
                ("certificate", certificate.encode()),
                ("recovery", b"".join(recipient.raw for recipient in recovery)),
            ],
        )
    database.close()
    return certificate


class State:
    """An opened state. ``clock`` answers Unix seconds. Raises StorageError when another process has it open."""

    def __init__(self, folder: str | os.PathLike[str], *, clock: Callable[[], int]) -> None:
        root = Path(folder)
        if not (root / "state.db").is_file():
            raise UsageError(f"{root} holds no service's state", hint="make one with `isolate serve --init`")
        self.clock = clock
        self._turn = threading.RLock()
        self._lock_file = (root / "lock").open("wb")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise StorageError(f"another service runs on {root}", code="second_writer") from None
        self._database = sqlite3.connect(root / "state.db", check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self.identity = Identity.load(root / "keys" / "recipient.key")
        self.release_key, self.result_key, self.log_key = (
            SigningKey.load(root / "keys" / f"{purpose}.key") for purpose in _KEYS
        )
        self.owner = VerifyingKey.from_bytes(self._meta("owner"))
        self.certificate = ServiceCertificate.parse(self._meta("certificate"))
        raw = self._meta("recovery")
        size = len(self.identity.recipient.raw)
        self.recovery = [Recipient(raw[at : at + size]) for at in range(0, len(raw), size)]

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
        """One writer at a time; committed and synced at the end, rolled back on any exception."""
        with self._turn:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                self._roll_back()
                raise StorageError(f"the state could not be written: {error.sqlite_errorname}") from None
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")

    def use_nonce(self, database: sqlite3.Connection, nonce: bytes) -> None:
        """Raises RefusedError when this nonce of a signed request was used before. It is never forgotten: a
        signed request carries no time that it would expire by."""
        try:
            database.execute("INSERT INTO seen VALUES (?)", (nonce,))
        except sqlite3.IntegrityError:
            raise RefusedError("this request was made before", code="replayed") from None

    def new_nonce(self) -> bytes:
        return secrets.token_bytes(32)

    def close(self) -> None:
        self._database.close()
        self._lock_file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
