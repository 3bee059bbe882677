"""Budgets: what a handle, and each of its ancestors, has used; and what is revoked.

Spec: docs/spec/service.md, section 6.

A use is charged, in one committed transaction, before its output may leave the enclave. The caller has passed
checks 1 to 6 of the broker, and then:

1. the token's chain verifies under the owner's key, and has no limit that is not enforced;
2. the invocation is by the token's holder, for this channel and these arguments, in the scope;
3. the asset that the token names is one that the caller may read;
4. no handle of the chain is revoked;
5. this invocation was not charged before;
6. every handle of the chain has uses and bytes left; all are charged together.
"""

from __future__ import annotations

import sqlite3

from isolate.capability.invocation import Invocation, verify_invocation
from isolate.capability.token import Token, VerifiedToken, verify
from isolate.crypto import merkle
from isolate.errors import BudgetExhausted, CapabilityRefused, Revoked
from isolate.messages.base import Signed
from isolate.messages.invoke import ENFORCED, Budget, ChargeRequest, Receipt
from isolate.messages.owner import Done, Revoke
from isolate.service.broker import Broker, Caller
from isolate.service.log import Log
from isolate.service.state import State


def _leaf(database: sqlite3.Connection, index: int) -> bytes:
    """The hash of the entry at ``index`` as a leaf of the log's tree, 32 bytes: what a receipt names."""
    row = database.execute("SELECT public FROM entry WHERE idx = ?", (index,)).fetchone()
    return merkle.leaf_hash(bytes(row[0]))


class Budgets:
    def __init__(self, state: State, log: Log, broker: Broker) -> None:
        self._state = state
        self._log = log
        self._broker = broker

    def _verify(self, token: bytes) -> VerifiedToken:
        verified = verify(Token.parse(token), self._state.owner.ed25519, now=self._state.clock())
        verified.scope.require_enforced(ENFORCED)
        return verified

    def charge(self, request: Signed) -> Receipt:
        """All the checks, then a receipt. A refusal is logged, and changes no account. Raises CapabilityRefused."""
        asked = ChargeRequest.parse(request.body)
        charged = self._broker.acting(request, lambda database, caller: self._charge(database, caller, asked))
        if isinstance(charged, CapabilityRefused):
            raise charged
        number, index, leaf = charged
        receipt = Receipt(number, asked.bytes_out, "", index, leaf, self._state.clock())
        return receipt.sign(self._state.release_key)

    def _charge(
        self, database: sqlite3.Connection, caller: Caller, request: ChargeRequest
    ) -> tuple[bytes, int, bytes] | CapabilityRefused:
        """The invocation's id and its place in the log; or the refusal, once it is in the log."""
        token = self._verify(request.token)
        invocation = verify_invocation(
            Invocation.parse(request.invocation),
            token,
            channel_binding=request.channel_binding,
            argument_hash=request.argument_hash,
        )
        Broker.allow(database, token.asset, caller.result.measurement, "readers")
        use = {"operation": invocation.operation, "asset": token.asset, "handle": token.handles[-1]}
        try:
            with self._state.transaction():
                self._check_revoked(database, token)
                self._check_new(database, invocation.id)
                self._spend(database, token, request.bytes_out)
                index = self._log.append(database, "use", use)
                return invocation.id, index, _leaf(database, index)
        except CapabilityRefused as refusal:
            # By the owner's grant: narrowed handles cost nothing to make, and would fill the log one by one.
            self._log.refused(database, "use refused", token.handles[0], refusal.code, use)
            return refusal

    @staticmethod
    def _check_revoked(database: sqlite3.Connection, token: VerifiedToken) -> None:
        for handle in token.handles:
            if database.execute("SELECT 1 FROM revoked WHERE handle = ?", (handle,)).fetchone():
                raise Revoked("this handle, or one it comes from, was revoked")

    @staticmethod
    def _check_new(database: sqlite3.Connection, invocation: bytes) -> None:
        try:
            database.execute("INSERT INTO charged VALUES (?)", (invocation,))
        except sqlite3.IntegrityError:
            raise CapabilityRefused("this invocation was charged before", code="replayed") from None

    @staticmethod
    def _spend(database: sqlite3.Connection, token: VerifiedToken, bytes_out: int) -> None:
        for handle, limits in zip(token.handles, token.limits, strict=True):
            uses, out = database.execute(
                "INSERT INTO account VALUES (?, 1, ?) ON CONFLICT (handle) DO UPDATE SET "
                "uses = uses + 1, bytes_out = bytes_out + excluded.bytes_out RETURNING uses, bytes_out",
                (handle, bytes_out),
            ).fetchone()
            if limits.uses is not None and uses > limits.uses:
                raise BudgetExhausted(f"all {limits.uses} uses of this handle, or of one it comes from, are spent")
            if limits.bytes_out is not None and out > limits.bytes_out:
                raise BudgetExhausted("the bytes that may leave through this handle are spent")

    def budget(self, token: bytes, holder: bytes) -> Budget:
        """What is left, for the holder (Ed25519, 32 bytes) of the token. Raises CapabilityRefused."""
        verified = self._verify(token)
        if verified.holder != holder:
            raise CapabilityRefused("only its holder asks for a handle's budget", code="holder_refused")
        uses: list[int] = []
        out: list[int] = []
        with self._state.transaction() as database:
            self._check_revoked(database, verified)
            for handle, limits in zip(verified.handles, verified.limits, strict=True):
                row = database.execute("SELECT uses, bytes_out FROM account WHERE handle = ?", (handle,)).fetchone()
                spent = row or (0, 0)
                if limits.uses is not None:
                    uses.append(max(0, limits.uses - spent[0]))
                if limits.bytes_out is not None:
                    out.append(max(0, limits.bytes_out - spent[1]))
        return Budget(min(uses, default=None), min(out, default=None))

    def revoke(self, request: Revoke) -> Done:
        """End a handle and all that come from it, at once and for good."""
        with self._state.transaction() as database:
            database.execute("INSERT OR IGNORE INTO revoked VALUES (?)", (request.handle,))
            return Done(self._log.append(database, "revoke", {"handle": request.handle}))
