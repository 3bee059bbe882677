"""Renewing a service's keys, and going on after its state was lost or restored from an old copy.

    >>> import tempfile
    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.sealed.recipients import Passphrase
    >>> from isolate.service.state import State, create
    >>> owner, unlock = SigningKey.generate(), Passphrase("correct horse", memory=64, passes=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = {"name": "demo", "lineage": "demo", "recovery": [], "unlock": unlock, "epoch": 1}
    ...     _ = create(folder, owner=owner, now=1_700_000_000, **made)
    ...     recover(folder, owner=owner, unlock=unlock, clock=lambda: 1_700_000_060).audience
    'demo/2'

An old copy has forgotten: nonces that were used, uses that were charged, handles and rules that were taken back,
newer files. None of that can be got back, so a recovery lets nothing of before hold. It begins another *epoch*:

1. requests name the epoch, so none that was signed before is taken again;
2. results, challenges and answers of before were signed with other keys, and no instance is known: all attest anew;
3. grants name the epoch: every handle of before has ended, and what is open in budgets stays spent;
4. no policy and no rule is in force until the owner gives them again, of a higher sequence; nothing is exported
   until the approvers have agreed on themselves again;
5. no file is released until the owner has said which one of its asset is the newest (`isolate rollback`), and no
   enclave makes the next one before that;
6. the log goes on under another name and key, and its first entry says what was found and what was missing.

Spec: docs/spec/service.md, section 9.3.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from typing import Any

from isolate.crypto import merkle
from isolate.crypto.kem import Identity
from isolate.crypto.signing import SigningKey
from isolate.errors import UsageError
from isolate.messages.attest import ServiceCertificate
from isolate.service import accounts
from isolate.service.keyring import Unlock
from isolate.service.log import Log
from isolate.service.state import State
from isolate.transparency.checkpoint import Checkpoint
from isolate.transparency.keeping import is_before

# What a recovery takes out of force. Slots stay: a generation is never given twice.
_VOID = (
    "DELETE FROM seen",
    "DELETE FROM instance",
    "DELETE FROM rule",
    "DELETE FROM head",
    "UPDATE policy SET signed = x''",
    # What was open stays spent, and nothing of it leaves any more.
    "UPDATE reservation SET settled = -1 WHERE settled = 0",
    "DELETE FROM meta WHERE key LIKE 'authority/%' OR key LIKE 'box/%'",
)


def rotate(
    folder: str | os.PathLike[str],
    *,
    owner: SigningKey,
    unlock: Unlock | Identity,
    new: Unlock | None = None,
    clock: Callable[[], int],
) -> ServiceCertificate:
    """Fresh release, result and recipient keys and 90 more days; the log's key, epoch and contents stay.

    ``new`` opens the keys from now on; it must be given when ``unlock`` is the owner's recovery identity. Enclaves
    attest anew by themselves; channels between them end at the next renewal. The service must not run. Raises
    UsageError for another owner's key, and what State raises.
    """
    with State(folder, unlock=unlock, clock=clock) as state:
        keys = state.keys.rotated(owner, now=state.clock())
        details = {"certificate": keys.certificate.digest, "not_after": keys.certificate.not_after}
        with state.transaction() as database:
            state.expect(keys.certificate)
            Log(state).append(database, "keys", details)
        keys.save(state.folder, owner=owner, unlock=_opener(unlock, new))
        return keys.certificate


def recover(
    folder: str | os.PathLike[str],
    *,
    owner: SigningKey,
    unlock: Unlock | Identity,
    new: Unlock | None = None,
    kept: str | None = None,
    clock: Callable[[], int],
) -> ServiceCertificate:
    """Begin another epoch. ``kept``: the last checkpoint that is known of, to say in the log what is missing.

    Interrupted, it is to be run again; until then the state does not open. Raises UsageError for another owner's
    key, LogRefused for a checkpoint of another log, and what State raises.
    """
    with State(folder, unlock=unlock, clock=clock, recovering=True) as state:
        log = Log(state)
        found: dict[str, Any] | None = None
        if kept is not None and not is_before(kept, state.name, state.certificate.epoch):
            seen = Checkpoint.verify(kept, log.origin, state.log_key.verifying_key.ed25519)
            found = {"size": seen.size, "root": seen.root}
        with state.transaction() as database:
            (before,) = database.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
            epoch = max(int(before), state.certificate.epoch) + 1
            keys = state.keys.rotated(owner, now=state.clock(), epoch=epoch)
            nodes, size = log.tree(database)
            here = {"size": size, "root": merkle.root(nodes, size)}
            _end_derived(database)
            for statement in _VOID:
                database.execute(statement)
            state.expect(keys.certificate)
            database.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (str(epoch).encode(),))
            log.append(database, "recovery", {"epoch": epoch, "found": here, "kept": found})
        # In this order: were the keys first, an interruption would leave a state that takes what it must not.
        keys.save(state.folder, owner=owner, unlock=_opener(unlock, new))
        return keys.certificate


def _end_derived(database: sqlite3.Connection) -> None:
    """What was made through a handle ended with it; whether that was revoked before, an old copy does not know."""
    for (handles,) in database.execute("SELECT handles FROM derived").fetchall():
        ended = [(one,) for one in accounts.parted(bytes(handles))]
        database.executemany("INSERT OR IGNORE INTO revoked VALUES (?)", ended)


def _opener(unlock: Unlock | Identity, new: Unlock | None) -> Unlock:
    if new is not None:
        return new
    if isinstance(unlock, Identity):
        raise UsageError("say how the keys are opened from now on", hint="a new passphrase")
    return unlock
