"""Budgets: uses are reserved before an operation runs, settled before its output leaves; and handles are revoked.

Spec: docs/spec/service.md, section 6.

Reserve: the worst case of one use is spent, in one committed transaction, before the operation runs. The caller has
passed checks 1 to 6 of the broker, and then:

1. the token's chain verifies under the owner's key, now, and has no limit that is not enforced;
2. the invocation is by the token's holder, for this channel and these arguments, in the scope;
3. the asset that the token names is one that the caller may read;
4. no handle of the chain is revoked;
5. this invocation was not reserved before;
6. every account (isolate.service.accounts) has uses, bytes and, in every window, uses left: all are spent together.

Lease: the same for many uses at once, the first of which is reserved, where the owner's grant opts in (1). The
enclave spends the others by itself, for MAX_LEASE seconds at most and not beyond the handle; they are not settled.

Settle: only after it may the reply leave. Checks 1 to 6 of the broker again, and then:

7. this very instance reserved the invocation;
8. it was not settled before;
9. what leaves is no more than was reserved;
10. the handle has not expired, none of its chain is revoked, and the caller may still read the asset.

Then the bytes that were not needed are given back, and nothing else ever is. What was reserved and never settled
stays spent: a crash loses budget, and mints none.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

from isolate.capability.invocation import Invocation, VerifiedInvocation, verify_invocation
from isolate.capability.token import ChainCache, VerifiedToken, verify
from isolate.crypto import cbor, merkle
from isolate.errors import CapabilityRefused, OutputRefused, RefusedError
from isolate.messages.base import Signed
from isolate.messages.invoke import (
    ENFORCED,
    Budget,
    Noted,
    Receipt,
    RefusalReport,
    Reservation,
    ReserveRequest,
    SettleRequest,
)
from isolate.messages.lease import MAX_LEASE, Lease, LeaseRequest
from isolate.messages.limits import AssetLimits
from isolate.messages.owner import Done, Revoke
from isolate.messages.receipts import UseReceipt
from isolate.service import accounts
from isolate.service.broker import Broker, Caller
from isolate.service.explain import because, checking, text
from isolate.service.log import Log
from isolate.service.state import State

T = TypeVar("T")


def _lease_end(token: VerifiedToken, now: int) -> int:
    return now + MAX_LEASE if token.scope.expires is None else min(now + MAX_LEASE, token.scope.expires)


class Budgets:
    def __init__(self, state: State, log: Log, broker: Broker) -> None:
        self._state = state
        self._log = log
        self._broker = broker
        self._chains = ChainCache()

    def _chain(self, token: bytes) -> VerifiedToken:
        return verify(
            token,
            self._state.owner.ed25519,
            now=self._state.clock(),
            epoch=self._state.certificate.epoch,
            cache=self._chains,
        )

    def _verify(self, token: bytes) -> VerifiedToken:
        verified = self._chain(token)
        verified.scope.require_enforced(ENFORCED)
        return verified

    def _answered(self, request: Signed, act: Callable[[sqlite3.Connection, Caller], T | RefusedError]) -> T:
        """What ``act`` answers; a refusal is answered too, so that its log entry is committed, and raised here."""
        answer = self._broker.acting(request, act)
        if isinstance(answer, RefusedError):
            raise answer
        return answer

    def reserve(self, request: Signed) -> Reservation:
        """Checks 1 to 6. A refusal is logged, and changes no account. Raises RefusedError."""
        asked = ReserveRequest.parse(request.body)
        invocation, index, now = self._answered(
            request, lambda database, caller: self._reserve(database, caller, asked)
        )
        return Reservation.make(invocation.id, index, now, self._state.release_key)

    def lease(self, request: Signed) -> Lease:
        """Checks 1 to 6, for all the uses of a lease. Refusals are as those of ``reserve``. Raises RefusedError."""
        asked = LeaseRequest.parse(request.body)
        invocation, index, now = self._answered(
            request, lambda database, caller: self._reserve(database, caller, asked)
        )
        # From the time of the commit: a revocation that came after it is kept waiting no longer than that.
        expires = _lease_end(invocation.token, now)
        lease = Lease(invocation.id, asked.uses, asked.bytes_out, expires, index, now)
        return lease.sign(self._state.release_key)

    def settle(self, request: Signed) -> Receipt:
        """Checks 7 to 10. A refusal is logged, gives nothing back, and lets nothing leave. Raises RefusedError."""
        asked = SettleRequest.parse(request.body)
        return self._answered(request, lambda database, caller: self._settle(database, caller, asked)).sign(
            self._state.release_key
        )

    def refused(self, request: Signed) -> Noted:
        """Write down what an enclave refused by itself: for the grant, where it reads the asset of that."""
        asked = RefusalReport.parse(request.body)

        def act(database: sqlite3.Connection, caller: Caller) -> Noted:
            subject, use = caller.result.instance, dict[str, Any](instance=caller.result.instance)
            with contextlib.suppress(RefusedError):
                token = self._chain(asked.token)
                Broker.allow(database, token.asset, caller.result.measurement, "readers")
                subject, use = token.handles[0], {**use, "asset": token.asset, "handle": token.id}
            # Counted apart from what the service refuses with this code: who is refused by an enclave often, at no
            # cost, would hide that.
            subject, kind = b"enclave" + subject, "invocation refused"
            return Noted(self._log.refused(database, kind, subject, asked.code, use, times=asked.times))

        return self._broker.acting(request, act)

    def _reserve(
        self, database: sqlite3.Connection, caller: Caller, request: ReserveRequest | LeaseRequest
    ) -> tuple[VerifiedInvocation, int, int] | RefusedError:
        """The invocation, its place in the log, and when; or the refusal, once it is in the log."""
        uses = request.uses if isinstance(request, LeaseRequest) else 1
        # By the owner's grant: narrowed handles cost nothing to make, and would fill the log one by one. Before a
        # grant has verified, by who asks.
        subject, use = caller.result.instance, dict[str, Any]()
        try:
            with self._state.transaction():
                with checking(7, f"a grant of this owner's, of this epoch, good at {self._state.clock()}"):
                    token = self._verify(request.token)
                    if isinstance(request, LeaseRequest) and uses > token.lease:
                        raise CapabilityRefused(
                            "the owner's grant allows no lease of so many uses", code="lease_refused"
                        )
                subject, use = token.handles[0], {"asset": token.asset, "handle": token.id}
                with checking(8, "made by the handle's holder, for this channel, these arguments, in its scope"):
                    invocation = verify_invocation(
                        Invocation.parse(request.invocation),
                        token,
                        channel_binding=request.channel_binding,
                        argument_hash=request.argument_hash,
                    )
                use["operation"] = invocation.operation
                Broker.allow(database, token.asset, caller.result.measurement, "readers", check=9)
                with checking(10, f"none of {', '.join(text(one) for one in token.handles)} revoked"):
                    accounts.check_revoked(database, token.handles)
                spent = accounts.accounts_of(database, token)
                with checking(11, f"invocation {text(invocation.id)} never reserved before"):
                    self._open(database, caller, invocation, [one.id for one in spent], request.bytes_out)
                now, out = self._state.clock(), uses * request.bytes_out
                with checking(12, f"{uses} uses and {out} bytes left in every account"):
                    accounts.spend(database, spent, uses=uses, bytes_out=out, now=now)
                details = {**use, "invocation": invocation.id, "bytes_out": request.bytes_out}
                if isinstance(request, LeaseRequest):
                    details |= {"uses": uses, "expires": _lease_end(token, now)}
                    return invocation, self._log.append(database, "lease", details), now
                return invocation, self._log.append(database, "use", details), now
        except RefusedError as refusal:
            self._log.refused(database, "use refused", subject, refusal.code, use)
            return refusal

    @staticmethod
    def _open(
        database: sqlite3.Connection,
        caller: Caller,
        invocation: VerifiedInvocation,
        spent: list[bytes],
        bytes_out: int,
    ) -> None:
        token = invocation.token
        row = (
            invocation.id, caller.result.instance, token.asset, accounts.joined(token.handles),
            accounts.joined(spent), bytes_out, token.scope.expires, 0,
        )  # fmt: skip
        try:
            database.execute("INSERT INTO reservation VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise CapabilityRefused("this invocation was reserved before", code="replayed") from None

    def _settle(
        self, database: sqlite3.Connection, caller: Caller, request: SettleRequest
    ) -> Receipt | RefusedError:
        row = database.execute(
            "SELECT instance, asset, handles, accounts, bytes_out, expires, settled FROM reservation "
            "WHERE invocation = ?",
            (request.invocation,),
        ).fetchone()
        # One answer for both: nobody learns from it what others have open.
        if row is None or bytes(row[0]) != caller.result.instance:  # 7
            unknown = CapabilityRefused("this instance has not reserved this use", code="unknown_reservation")
            found = text(bytes(row[0])) if row else "nobody"
            raise because(7, unknown, expected=text(caller.result.instance), found=found)
        _, asset, handles, spent, reserved, expires, settled = row
        chain = accounts.parted(bytes(handles))
        use = {"asset": asset, "handle": chain[-1], "invocation": request.invocation}
        try:
            with self._state.transaction():
                with checking(8, "an open reservation"):
                    if settled:
                        raise CapabilityRefused("this use was settled before", code="replayed")
                with checking(9, f"at most {reserved} bytes"):
                    if request.bytes_out > reserved:
                        raise OutputRefused(f"{reserved} bytes were reserved for this reply, which is longer")
                with checking(10, f"a handle that is good at {self._state.clock()}, none of its chain revoked"):
                    if expires is not None and self._state.clock() >= expires:
                        raise CapabilityRefused("this handle expired during the use", code="expired")
                    accounts.check_revoked(database, chain)
                Broker.allow(database, asset, caller.result.measurement, "readers", check=10)
                accounts.refund(database, accounts.parted(bytes(spent)), reserved - request.bytes_out)
                details = {**use, "bytes_out": request.bytes_out, "code": request.code}
                index = self._log.append(database, "settled", details)
                database.execute(
                    "UPDATE reservation SET settled = ? WHERE invocation = ?", (index, request.invocation)
                )
        except RefusedError as refusal:
            self._log.refused(database, "settle refused", chain[0], refusal.code, use)
            return refusal
        leaf = merkle.leaf_hash(self._log.opened(database, index)[0])
        return Receipt(request.invocation, request.bytes_out, request.code, index, leaf, self._state.clock())

    def receipt(self, invocation: bytes, holder: bytes) -> UseReceipt:
        """A settled use's receipt, for a holder (Ed25519, 32 bytes) of its chain: at any time, also once the handle
        has ended. Raises CapabilityRefused."""
        with self._state.transaction() as database:
            row = database.execute(
                "SELECT asset, accounts, settled FROM reservation WHERE invocation = ?", (invocation,)
            ).fetchone()
            # One answer for both: nobody learns from it what others did.
            if row is None or accounts.holder_account(row[0], holder) not in accounts.parted(bytes(row[1])):
                raise CapabilityRefused(
                    "no use through a handle of yours has this id",
                    code="unknown_reservation",
                    hint="a use that an enclave spent from a lease, or never asked for, has no receipt",
                )
            # What is open, or a recovery closed, has no entry; a state from before it was kept has 1 for each use.
            public, salt, details = self._log.opened(database, max(row[2], 0))
            said = cbor.decode(details)
            if said.get("invocation") != invocation:
                raise CapabilityRefused(
                    "no entry of the log that settles this use is known",
                    code="not_settled",
                    hint="what was reserved and never settled stays spent",
                )
            now = self._state.clock()
        receipt = Receipt(invocation, said["bytes_out"], said["code"], row[2], merkle.leaf_hash(public), now)
        return UseReceipt(receipt.sign(self._state.release_key).encode(), public, salt, details)

    def budget(self, token: bytes, holder: bytes) -> Budget:
        """What is left, for the holder (Ed25519, 32 bytes) of the token. Raises CapabilityRefused."""
        verified = self._verify(token)
        if verified.holder != holder:
            raise CapabilityRefused("only its holder asks for a handle's budget", code="holder_refused")
        with self._state.transaction() as database:
            accounts.check_revoked(database, verified.handles)
            return Budget(*accounts.left(database, accounts.accounts_of(database, verified)))

    def revoke(self, request: Revoke) -> Done:
        """End a handle and all that come from it, at once and for good."""
        with self._state.transaction() as database:
            database.execute("INSERT OR IGNORE INTO revoked VALUES (?)", (request.handle,))
            (number,) = database.execute("SELECT count(*) FROM revoked").fetchone()
            return Done(self._log.append(database, "revoke", {"handle": request.handle, "number": number}))

    def set_limits(self, limits: AssetLimits) -> Done:
        """Say what all holders of an asset, and each of them, may take from it in all."""
        row = (limits.asset, limits.uses, limits.bytes_out, limits.holder_uses, limits.holder_bytes)
        with self._state.transaction() as database:
            database.execute("INSERT OR REPLACE INTO limits VALUES (?, ?, ?, ?, ?)", row)
            details = dict(zip(("asset", "uses", "bytes_out", "holder_uses", "holder_bytes"), row, strict=True))
            return Done(self._log.append(database, "limits", details))
