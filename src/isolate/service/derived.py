"""Derived assets: what an operation made of another, and which handles it hangs on.

Spec: docs/spec/operations.md, section 6.

An enclave registers one while the invocation that makes it is reserved and not yet settled. The caller has passed
checks 1 to 6 of the broker, and then:

1. this very instance reserved the invocation, and has not settled it;
2. no handle of the invocation's chain is revoked;
3. the rule of the asset that it was made of names the caller among the readers;
4. the new asset has the name that follows from that asset and the invocation;
5. the file was sealed by the caller under that name, the service can open it, and it is the only one of that use.

Its keys are released like those of the asset it was made of, as long as no handle of that chain is revoked.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from isolate.errors import CapabilityRefused, RolledBack, UnauthenticatedOrigin
from isolate.messages.attest import Registered, RegisterRequest
from isolate.messages.derive import DeriveRequest, derived_name
from isolate.service import accounts

if TYPE_CHECKING:
    from isolate.messages.base import Signed
    from isolate.service.broker import Broker, Caller
    from isolate.service.log import Log

SCHEMA = """
CREATE TABLE derived (asset TEXT PRIMARY KEY, parent TEXT NOT NULL, handles BLOB NOT NULL) WITHOUT ROWID;
"""


def readers_rule(database: sqlite3.Connection, asset: str) -> str:
    """Whose rule says who reads this asset: its own, or that of the one it was made of.

    Raises Revoked when a handle that it hangs on was revoked, whatever the rules say.
    """
    row = database.execute("SELECT parent, handles FROM derived WHERE asset = ?", (asset,)).fetchone()
    if row is None:
        return asset
    accounts.check_revoked(database, accounts.parted(bytes(row[1])))
    own = database.execute("SELECT 1 FROM rule WHERE asset = ?", (asset,)).fetchone()
    return asset if own else str(row[0])


class Derived:
    def __init__(self, log: Log, broker: Broker) -> None:
        self._log = log
        self._broker = broker

    def derive(self, request: Signed) -> Registered:
        """Checks 1 to 5; the asset is registered, with what it hangs on, and logged. Raises RefusedError."""
        asked = DeriveRequest.parse(request.body)
        return self._broker.acting(request, lambda database, caller: self._derive(database, caller, asked))

    def _derive(self, database: sqlite3.Connection, caller: Caller, asked: DeriveRequest) -> Registered:
        row = database.execute(
            "SELECT instance, asset, handles, settled FROM reservation WHERE invocation = ?", (asked.invocation,)
        ).fetchone()
        if row is None or bytes(row[0]) != caller.result.instance or row[3]:  # 1
            raise CapabilityRefused("this instance has no such use under way", code="unknown_reservation")
        parent, handles = str(row[1]), bytes(row[2])
        chain = accounts.parted(handles)
        accounts.check_revoked(database, chain)  # 2
        self._broker.allow(database, parent, caller.result.measurement, "readers")  # 3
        if asked.asset != derived_name(parent, asked.invocation):  # 4
            raise UnauthenticatedOrigin("this is not what the invocation's asset is called", hint="")
        if database.execute("SELECT 1 FROM derived WHERE asset = ?", (asked.asset,)).fetchone():
            raise RolledBack("this use has made its asset already")
        registration = RegisterRequest(asked.asset, asked.header, asked.directory)
        registered = self._broker.register(registration, signer=caller.signing_key, measurement=None)  # 5
        database.execute("INSERT INTO derived VALUES (?, ?, ?)", (asked.asset, parent, handles))
        details = {"asset": asked.asset, "parent": parent, "handle": chain[-1], "invocation": asked.invocation}
        self._log.append(database, "derive", details)
        return registered
