"""Approvals: plaintext leaves the service only when several of the owner's people have said so.

Spec: docs/spec/service.md, section 6.5.

The owner's root names the group once. From then on a group is followed by another only if the threshold of its own
members approves that; the root key alone is refused. An export is refused unless, in this order:

1. there is a group, which was named, or agreed on again, in the present epoch;
2. every approval is for exactly this: service, asset, digest, destination and reason, and its signature verifies;
3. its key is in the group, and signed no other of these approvals;
4. it has not expired;
5. there are as many as the group's threshold;
6. none was used before;
7. the asset has a registered file with this digest.

Then the keys are unwrapped, the approvals are used up and the export is logged, all in one committed transaction,
and only then are the keys sealed to the destination. An answer that is lost takes new approvals.

This is the control on what the *service* gives out. Who holds a recovery identity opens what was sealed to it, and
who holds the root key can sign a policy for code that gives data away: that needs other means (threat-model.md).
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

from isolate import sealed
from isolate.crypto import cbor
from isolate.errors import IsolateError, RefusedError, ReleaseRefused
from isolate.messages.approve import (
    Approval,
    Approvers,
    Export,
    ExportContext,
    ExportRequest,
    GroupApproval,
    GroupSet,
    SetApprovers,
)

if TYPE_CHECKING:
    from isolate.service.log import Log
    from isolate.service.state import State

SCHEMA = """
CREATE TABLE approvers (
    sequence INTEGER PRIMARY KEY, threshold INTEGER NOT NULL, keys BLOB NOT NULL, epoch INTEGER NOT NULL);
CREATE TABLE approved (approval BLOB PRIMARY KEY) WITHOUT ROWID;
"""


class Approvals:
    def __init__(self, state: State, log: Log) -> None:
        self._state = state
        self._log = log

    @staticmethod
    def _group(database: sqlite3.Connection) -> tuple[int, Approvers | None]:
        """The number and the members of the present group; 0 and None before there is one."""
        row = database.execute(
            "SELECT sequence, threshold, keys FROM approvers ORDER BY sequence DESC LIMIT 1"
        ).fetchone()
        return (row[0], Approvers(row[1], cbor.decode(bytes(row[2])))) if row else (0, None)

    def set_approvers(self, request: SetApprovers) -> GroupSet:
        """Name the group, or the next one. Raises RefusedError without the present group's approvals."""
        group = request.group
        with self._state.transaction() as database:
            last, present = self._group(database)
            sequence = last + 1
            if present is not None:
                given = [GroupApproval.parse(one) for one in request.approvals]
                for one in given:
                    one.check(group, service=self._state.audience, sequence=sequence)
                self._check_members(present, given)
            row = (sequence, group.threshold, cbor.encode(group.keys), self._state.certificate.epoch)
            database.execute("INSERT INTO approvers VALUES (?, ?, ?, ?)", row)
            details = {"sequence": sequence, "threshold": group.threshold, "keys": group.keys}
            return GroupSet(sequence, self._log.append(database, "approvers", details))

    def _check_members(self, group: Approvers, given: list[GroupApproval] | list[Approval]) -> None:
        """Checks 3 to 5. Raises RefusedError."""
        keys = [one.key for one in given]
        if len(set(keys)) != len(keys) or not set(keys) <= set(group.keys):
            raise RefusedError(
                "an approval is by somebody who is no approver, or counts twice", code="not_approver"
            )
        if any(self._state.clock() >= one.not_after for one in given):
            raise RefusedError("an approval has expired", code="approval_expired", hint="approve again")
        if len(given) < group.threshold:
            raise RefusedError(
                f"{len(given)} approved, and {group.threshold} must",
                code="approvals_missing",
                hint="others make theirs with `isolate approve`",
            )

    def export(self, request: ExportRequest) -> Export:
        """All the checks, then the keys of every compartment, sealed to the destination. Raises RefusedError."""
        with self._state.transaction() as database:
            opened = self._open(database, request)
        if isinstance(opened, IsolateError):
            raise opened
        return Export.make(*opened, self._state.release_key)

    def _open(
        self, database: sqlite3.Connection, request: ExportRequest
    ) -> tuple[ExportContext, dict[str, bytes]] | RefusedError:
        """The keys, once they are in the log; or the refusal."""
        _, group = self._group(database)
        if group is None:  # 1
            raise RefusedError(
                "nobody was named to approve exports", code="no_approvers", hint="`isolate approvers` names them"
            )
        (epoch,) = database.execute("SELECT epoch FROM approvers ORDER BY sequence DESC LIMIT 1").fetchone()
        if epoch != self._state.certificate.epoch:
            raise RefusedError(
                "the service was recovered, and these approvers may have been followed by others",
                code="unconfirmed",
                hint="they agree on the group again with `isolate approvers`",
            )
        wish = request.wish(self._state.audience)
        given = [Approval.parse(one) for one in request.approvals]
        said: dict[str, Any] = {
            "asset": wish.asset, "digest": wish.digest, "destination": wish.destination, "reason": wish.reason,
            "approvers": [one.key for one in given],
        }  # fmt: skip
        try:
            with self._state.transaction():
                for one in given:  # 2
                    one.check(wish)
                self._check_members(group, given)  # 3 to 5
                self._use(database, given)  # 6
                return self._release(database, request, said, [one.id for one in given])
        except RefusedError as refusal:
            # Who is no approver leaves no trace: anyone can sign something. An approver's word does, for what is
            # asked here or for another thing: somebody may have stolen it.
            words = [one.key for one in given if one.key in group.keys and one.verifies()]
            if words:
                said["approvers"] = words
                self._log.refused(database, "export refused", b"export", refusal.code, said)
            return refusal

    @staticmethod
    def _use(database: sqlite3.Connection, given: list[Approval]) -> None:
        try:
            for one in given:
                database.execute("INSERT INTO approved VALUES (?)", (one.id,))
        except sqlite3.IntegrityError:
            raise RefusedError("an approval was used before", code="replayed", hint="approve again") from None

    def _release(
        self, database: sqlite3.Connection, request: ExportRequest, said: dict[str, Any], used: list[bytes]
    ) -> tuple[ExportContext, dict[str, bytes]]:
        row = database.execute(
            "SELECT epoch, header, directory FROM asset WHERE asset = ? AND digest = ?",
            (request.asset, request.digest),
        ).fetchone()
        if row is None:  # 7
            raise ReleaseRefused(
                f"no file of {request.asset} is registered with this digest", code="unknown_asset", hint=""
            )
        facts = sealed.PublicFacts.parse(bytes(row[1]), bytes(row[2]))
        with self._state.keys.unlock(facts) as file_key:
            released = sealed.compartment_keys(file_key, facts)
        context = ExportContext(
            service=self._state.audience,
            asset=request.asset,
            digest=request.digest,
            epoch=row[0],
            compartments=sorted(released.keys),
            destination=request.destination,
            reason=request.reason,
            nonce=request.nonce,
            approvals=used,
            log_index=self._log.append(database, "export", said),
            time=self._state.clock(),
        )
        return context, {name: bytes(key.expose()) for name, key in released.keys.items()}
