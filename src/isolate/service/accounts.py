"""The accounts that a use is spent from: rows in the service's database, and nothing but rows.

A use through a chain of handles is spent from all of these at once, and each has a ceiling of its own:

- every handle of the chain, up to the effective scope of its prefix;
- every holder of the chain, on this asset: up to the rates of the first handle it was given in the chain, and up to
  what the owner lets one holder use of the asset (AssetLimits);
- the asset, up to what the owner lets all use of it together.

So a holder gains nothing by narrowing one handle into many, or by passing it on to keys of its own.

    >>> import sqlite3
    >>> database = sqlite3.connect(":memory:")
    >>> _ = database.executescript(SCHEMA)
    >>> account = Account(b"a" * 32, "this handle", uses=2, rates={60: 1})
    >>> spend(database, [account], uses=1, bytes_out=256, now=100)
    >>> spend(database, [account], uses=1, bytes_out=256, now=159)
    Traceback (most recent call last):
    isolate.errors.BudgetExhausted: this handle may be used 1 times in 60 seconds (try again later)
    >>> database.rollback()

Every function works inside the caller's transaction, which undoes what a refusal left half-done. Times are Unix
seconds of the service's clock, which never goes back. Spec: docs/spec/service.md, section 6.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from hashlib import sha256

from attrs import field, frozen

from isolate.capability.token import VerifiedToken
from isolate.errors import BudgetExhausted, Revoked
from isolate.messages.limits import AssetLimits

# ``pace`` has a row for every second in which an account was used, with all its uses up to then: how many there
# were in a window is one look-up, however many there are. Like the log it grows with the uses, and only with them.
# ``settled`` is the entry of the log that says so: 0 while the use is open (no log begins with a settled one), and
# -1 where a recovery closed it.
SCHEMA = """
CREATE TABLE account (account BLOB PRIMARY KEY, uses INTEGER NOT NULL, bytes_out INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE pace (
    account BLOB, time INTEGER, uses INTEGER NOT NULL, PRIMARY KEY (account, time)) WITHOUT ROWID;
CREATE TABLE limits (
    asset TEXT PRIMARY KEY, uses INTEGER, bytes_out INTEGER, holder_uses INTEGER, holder_bytes INTEGER);
CREATE TABLE reservation (
    invocation BLOB PRIMARY KEY, instance BLOB NOT NULL, asset TEXT NOT NULL, handles BLOB NOT NULL,
    accounts BLOB NOT NULL, bytes_out INTEGER NOT NULL, expires INTEGER, settled INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE revoked (handle BLOB PRIMARY KEY) WITHOUT ROWID;
"""

ID_SIZE = 32


@frozen
class Account:
    """One account and its ceilings; None is no limit. ``whose`` is how a refusal calls it."""

    id: bytes = field(repr=False)
    whose: str
    uses: int | None = None
    bytes_out: int | None = None
    rates: Mapping[int, int] | None = None
    paced: bool = False  # whether its uses are kept second by second, for rates of handles that are still to come


def holder_account(asset: str, holder: bytes) -> bytes:
    """The id of the account of a holder (Ed25519, 32 bytes) on an asset."""
    return sha256(b"isolate/v1/service/account/holder\0" + holder + asset.encode()).digest()


def asset_account(asset: str) -> bytes:
    """The id of the account of an asset."""
    return sha256(b"isolate/v1/service/account/asset\0" + asset.encode()).digest()


def limits_of(database: sqlite3.Connection, asset: str) -> AssetLimits:
    """What the owner set for an asset: nothing where there is no row."""
    row = database.execute(
        "SELECT uses, bytes_out, holder_uses, holder_bytes FROM limits WHERE asset = ?", (asset,)
    ).fetchone()
    return AssetLimits(asset, *(row or (None,) * 4))


def accounts_of(database: sqlite3.Connection, token: VerifiedToken) -> list[Account]:
    """All the accounts of a chain: handles from the grant on, then holders, then the asset."""
    found = [
        Account(handle, "this handle, or one it comes from,", scope.uses, scope.bytes_out, scope.rates)
        for handle, scope in zip(token.handles, token.limits, strict=True)
    ]
    most = limits_of(database, token.asset)
    for number, holder in enumerate(token.holders):
        if holder in token.holders[:number]:
            continue
        # Its first handle says what it was given; what it narrowed for itself has an account of its own.
        found.append(
            Account(
                holder_account(token.asset, holder),
                "this holder, or one before it,",
                most.holder_uses,
                most.holder_bytes,
                token.limits[number].rates,
                paced=True,
            )
        )
    found.append(
        Account(asset_account(token.asset), "all holders of this asset together", most.uses, most.bytes_out)
    )
    return found


def spend(
    database: sqlite3.Connection, accounts: Sequence[Account], *, uses: int, bytes_out: int, now: int
) -> None:
    """Spend from every account. Raises BudgetExhausted (for a rate with the code ``rate_exceeded``)."""
    for account in accounts:
        total, out = database.execute(
            "INSERT INTO account VALUES (?, ?, ?) ON CONFLICT (account) DO UPDATE SET "
            "uses = uses + excluded.uses, bytes_out = bytes_out + excluded.bytes_out RETURNING uses, bytes_out",
            (account.id, uses, bytes_out),
        ).fetchone()
        if account.uses is not None and total > account.uses:
            raise BudgetExhausted(f"{account.whose} may be used {account.uses} times in all, and was")
        if account.bytes_out is not None and out > account.bytes_out:
            raise BudgetExhausted(f"the bytes that may leave through {account.whose.rstrip(',')} are spent")
        if account.rates is not None:
            _check_rates(database, account, total, now)
        if account.rates is not None or account.paced:
            database.execute("INSERT OR REPLACE INTO pace VALUES (?, ?, ?)", (account.id, now, total))


def _check_rates(database: sqlite3.Connection, account: Account, total: int, now: int) -> None:
    for seconds, most in (account.rates or {}).items():
        row = database.execute(
            "SELECT uses FROM pace WHERE account = ? AND time <= ? ORDER BY time DESC LIMIT 1",
            (account.id, now - seconds),
        ).fetchone()
        if total - (row[0] if row else 0) > most:
            raise BudgetExhausted(
                f"{account.whose} may be used {most} times in {seconds} seconds",
                code="rate_exceeded",
                hint="try again later",
            )


def refund(database: sqlite3.Connection, accounts: Sequence[bytes], bytes_out: int) -> None:
    """Give bytes back to the accounts with these ids. Uses are never given back."""
    for account in accounts:
        database.execute("UPDATE account SET bytes_out = bytes_out - ? WHERE account = ?", (bytes_out, account))


def left(database: sqlite3.Connection, accounts: Sequence[Account]) -> tuple[int | None, int | None]:
    """The least uses and bytes that are left over all accounts; None is no limit."""
    uses: list[int] = []
    out: list[int] = []
    for account in accounts:
        row = database.execute("SELECT uses, bytes_out FROM account WHERE account = ?", (account.id,)).fetchone()
        spent = row or (0, 0)
        if account.uses is not None:
            uses.append(max(0, account.uses - spent[0]))
        if account.bytes_out is not None:
            out.append(max(0, account.bytes_out - spent[1]))
    return min(uses, default=None), min(out, default=None)


def check_revoked(database: sqlite3.Connection, handles: Sequence[bytes]) -> None:
    """Raise Revoked if any of these handles was revoked."""
    for handle in handles:
        if database.execute("SELECT 1 FROM revoked WHERE handle = ?", (handle,)).fetchone():
            raise Revoked("this handle, or one it comes from, was revoked")


def joined(ids: Sequence[bytes]) -> bytes:
    """Ids as one value of a row."""
    return b"".join(ids)


def parted(ids: bytes) -> list[bytes]:
    """What ``joined`` put together."""
    return [ids[at : at + ID_SIZE] for at in range(0, len(ids), ID_SIZE)]
