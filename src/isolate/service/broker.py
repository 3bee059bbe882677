"""Assets and the release of their keys.

Spec: docs/spec/service.md, sections 3 to 5.

A release is refused unless, in this order:

1. the request is signed, for this service;
2. the result token is ours, has not expired, and is of the policy in force;
3. the request's key is the one that instance attested;
4. the instance holds its slot: no later one has taken it;
5. its measurement still stands in the policy, unrevoked;
6. the request's nonce is new;
7. the file is registered, and is the one of its asset that is in force: the newest, or what the owner put back;
8. the asset's rule lets this measurement read it.

Then the keys are unwrapped, the release is logged and committed, and only then does it leave. All of it is one
transaction, so that no rule, policy or slot changes between a check and the release.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

from attrs import frozen

from isolate import sealed
from isolate.attestation import result as results
from isolate.attestation.policy import Policy
from isolate.attestation.result import AttestationResult
from isolate.crypto import cbor
from isolate.crypto.signing import Purpose
from isolate.errors import (
    RefusedError,
    ReleaseRefused,
    ResultRefused,
    RolledBack,
    UnauthenticatedOrigin,
    UsageError,
)
from isolate.messages.attest import (
    PeerStandings,
    Registered,
    RegisterRequest,
    Release,
    ReleaseContext,
    ReleaseRequest,
    StandingRequest,
)
from isolate.messages.base import Signed
from isolate.messages.owner import AssetRequest, AssetRule, Done, Rollback
from isolate.sealed.recipients import compartment_keys
from isolate.service import derived
from isolate.service.appraiser import Appraiser
from isolate.service.explain import because, checking, text
from isolate.service.log import Log
from isolate.service.state import State

T = TypeVar("T")


@frozen
class Caller:
    """An attested instance whose request was verified (checks 1 to 5). Only ``Broker.acting`` hands one out."""

    result: AttestationResult
    keys: dict[str, bytes]
    signing_key: bytes


class Broker:
    def __init__(self, state: State, log: Log, appraiser: Appraiser) -> None:
        self._state = state
        self._log = log
        self._appraiser = appraiser

    def acting(self, request: Signed, act: Callable[[sqlite3.Connection, Caller], T]) -> T:
        """Checks 1 to 6, then ``act``, in one transaction (State.once).

        Raises RefusedError, ResultRefused or ReleaseRefused, and what ``act`` raises.
        """
        return self._state.once(request.nonce, lambda database: self._caller(database, request), act)

    def _caller(self, database: sqlite3.Connection, request: Signed) -> Caller:
        with checking(1, f"signed for {self._state.audience}"):
            key = request.verify(Purpose.ENCLAVE_REQUEST, self._state.audience)
        policy, in_force, now = self._appraiser.policy(), self._appraiser.policy_id(), self._state.clock()
        with checking(2, f"a result of this service, of policy {text(in_force)}, that has not expired at {now}"):
            result = results.verify(
                request.token,
                issuer_key=self._state.result_key.verifying_key.ed25519,
                now=now,
                INSECURE_accept_simulated=policy.INSECURE_accept_simulated,
            )
            if result.policy_id != in_force:
                raise ResultRefused("this result was made under an earlier policy", code="policy_changed")
        with checking(3, f"the key that instance {text(result.instance)} attested"):
            keys = self._keys(database, result.instance)
            if keys["sign"] != key.to_bytes():
                raise ResultRefused("this result was given to another instance", code="stolen_result")
        self._check_slot(database, result)
        self._check_measurement(database, policy, result.instance, now)
        return Caller(result, keys, key.to_bytes())

    @staticmethod
    def _keys(database: sqlite3.Connection, instance: bytes) -> dict[str, bytes]:
        row = database.execute("SELECT keys FROM instance WHERE instance = ?", (instance,)).fetchone()
        if row is None:
            raise ResultRefused("this instance did not attest here", code="unknown_instance")
        keys: dict[str, bytes] = cbor.decode(bytes(row[0]))
        return keys

    @staticmethod
    def _check_measurement(database: sqlite3.Connection, policy: Policy, instance: bytes, now: int) -> None:
        """By what was measured and not by name: several references may share one."""
        query = "SELECT kind, registers, measurement FROM instance WHERE instance = ?"
        kind, registers, name = database.execute(query, (instance,)).fetchone()
        measured: dict[str, bytes] = cbor.decode(bytes(registers))
        found = [one for one in policy.references if one.kind == kind and one.matches(measured)]
        # What a signed manifest admits stands in no policy: such a result is good for as long as its policy is.
        admitted = any(one.valid_at(now) for one in found) if found else bool(policy.trusted_signers)
        if not admitted or any(one.revoked_by(now) for one in found):
            error = ReleaseRefused("this measurement is no longer admitted", code="measurement_revoked")
            raise because(5, error, expected="a measurement that is valid now, and not revoked", found=name)

    def standing(self, request: Signed) -> PeerStandings:
        """Whether other instances still hold their slots, with admitted measurements: checks 4 and 5 for each."""
        asked = StandingRequest.parse(request.body)

        def look(database: sqlite3.Connection, _: Caller) -> PeerStandings:
            policy, now = self._appraiser.policy(), self._state.clock()
            codes = [self._standing(database, policy, one, now) for one in asked.instances]
            return PeerStandings(codes, policy.max_stale, now)

        return self.acting(request, look)

    def _standing(self, database: sqlite3.Connection, policy: Policy, instance: bytes, now: int) -> str:
        try:
            self._keys(database, instance)
            self._check_measurement(database, policy, instance, now)
        except RefusedError as error:
            return error.code
        holds = database.execute("SELECT 1 FROM slot WHERE instance = ?", (instance,)).fetchone()
        return "" if holds else "slot_retired"

    @staticmethod
    def _check_slot(database: sqlite3.Connection, result: AttestationResult) -> None:
        slot, holder = result.slot, b""
        if slot is not None:
            query = "SELECT instance FROM slot WHERE job = ? AND rank = ?"
            row = database.execute(query, (slot.job, slot.rank)).fetchone()
            holder = bytes(row[0]) if row else b""
        # By instance and not by generation: what a renewal overtakes on its way stays good until it expires.
        if holder != result.instance:
            error = ReleaseRefused("a later instance holds this slot", code="slot_retired")
            raise because(4, error, expected=text(result.instance), found=text(holder) or "nobody")

    def release(self, request: Signed) -> Release:
        asked = ReleaseRequest.parse(request.body)
        context, keys, hpke = self.acting(request, lambda database, caller: self._open(database, caller, asked))
        return Release.make(context, keys, hpke, self._state.release_key)

    def _open(
        self, database: sqlite3.Connection, caller: Caller, asked: ReleaseRequest
    ) -> tuple[ReleaseContext, dict[str, bytes], bytes]:
        """Checks 7 and 8, the keys, and the log entry."""
        asset, header, directory, epoch = self._in_force(database, asked.digest)
        self.allow(database, asset, caller.result.measurement, "readers")
        facts = sealed.PublicFacts.parse(header, directory)
        with self._state.keys.unlock(facts) as file_key:
            released = compartment_keys(file_key, facts, asked.compartments or None)
        context = ReleaseContext(
            asset=asset,
            digest=asked.digest,
            epoch=epoch,
            compartments=sorted(released.keys),
            nonce=asked.nonce,
            instance=caller.result.instance,
            policy=caller.result.policy_id,
            log_index=self._log.append(
                database,
                "release",
                {
                    "asset": asset,
                    "digest": asked.digest,
                    "compartments": sorted(released.keys),
                    "instance": caller.result.instance,
                    "measurement": caller.result.measurement,
                },
            ),
            time=self._state.clock(),
        )
        return context, {name: bytes(key.expose()) for name, key in released.keys.items()}, caller.keys["hpke"]

    @staticmethod
    def _in_force(database: sqlite3.Connection, digest: bytes) -> tuple[str, bytes, bytes, int]:
        """Check 7: asset, header, directory and epoch of this file."""
        row = database.execute(
            "SELECT asset, header, directory, epoch FROM asset WHERE digest = ?", (digest,)
        ).fetchone()
        if row is None:
            error = ReleaseRefused("no asset is registered with this digest", code="unknown_asset")
            raise because(7, error, expected="a registered file", found=text(digest))
        asset, header, directory, epoch = row
        head = database.execute("SELECT digest FROM head WHERE asset = ?", (asset,)).fetchone()
        if head is None:
            error = ReleaseRefused(
                f"the service was recovered, and its owner has not said yet which file of {asset} is the newest",
                code="unconfirmed",
                hint="`isolate rollback ASSET --to DIGEST` says it",
            )
            raise because(7, error, expected="a file that the owner named", found=text(digest))
        if bytes(head[0]) != digest:
            rolled = RolledBack(f"this file, epoch {epoch}, is not the one of {asset} that is in force")
            raise because(7, rolled, expected=text(bytes(head[0])), found=text(digest))
        return asset, bytes(header), bytes(directory), epoch

    @staticmethod
    def allow(
        database: sqlite3.Connection, asset: str, measurement: str, column: str, *, check: int | None = None
    ) -> None:
        """Raises ReleaseRefused unless the asset's rule names this measurement among its readers or writers.

        ``check``: which one of its route this is; that of a release or a registration when it is not given.
        """
        ruled = derived.readers_rule(database, asset) if column == "readers" else asset
        row = database.execute("SELECT readers, writers FROM rule WHERE asset = ?", (ruled,)).fetchone()
        names: list[Any] = cbor.decode(bytes(row[0 if column == "readers" else 1])) if row else []
        if measurement not in names:
            error = ReleaseRefused(f"the owner's rule for {asset} does not name {measurement}", code="rule_denied")
            number = check or (8 if column == "readers" else 7)
            raise because(number, error, expected=", ".join(names) or "nobody", found=measurement)

    def set_rule(self, rule: AssetRule) -> Done:
        with self._state.transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO rule VALUES (?, ?, ?)",
                (rule.asset, cbor.encode(rule.readers), cbor.encode(rule.writers)),
            )
            details = {"asset": rule.asset, "readers": rule.readers, "writers": rule.writers}
            return Done(self._log.append(database, "rule", details))

    def register_for(self, request: Signed) -> Registered:
        """Register what an enclave made: checks 1 to 6, and the asset's rule must name it among the writers."""
        asked = RegisterRequest.parse(request.body)
        return self.acting(
            request,
            lambda _, caller: self.register(
                asked, signer=caller.signing_key, measurement=caller.result.measurement
            ),
        )

    def register(self, request: RegisterRequest, *, signer: bytes, measurement: str | None) -> Registered:
        """Take a sealed file as the newest epoch of an asset.

        ``signer`` (a verifying key, 64 bytes) must have signed the file; ``measurement`` is None for the owner.
        Raises UnauthenticatedOrigin, RolledBack, ReleaseRefused or a SealedError.
        """
        facts = sealed.PublicFacts.parse(request.header, request.directory)
        if facts.signer is None or facts.signer.to_bytes() != signer:
            raise UnauthenticatedOrigin("this file was not sealed by whoever registers it", hint="")
        if facts.model_id != request.asset:
            raise UnauthenticatedOrigin(f"this file was sealed as {facts.model_id!r}", hint="")
        # A file that we cannot open now is one that nobody gets later: say so while its maker is there.
        self._state.keys.unlock(facts).wipe()
        with self._state.transaction() as database:
            if measurement is not None:
                self.allow(database, request.asset, measurement, "writers")
            (newest,) = database.execute(
                "SELECT max(epoch) FROM asset WHERE asset = ?", (request.asset,)
            ).fetchone()
            head = database.execute("SELECT 1 FROM head WHERE asset = ?", (request.asset,)).fetchone()
            if measurement is not None and newest is not None and head is None:
                raise ReleaseRefused(
                    f"the service was recovered, and its owner has not named the newest file of {request.asset}",
                    code="unconfirmed",
                )
            if newest is not None and facts.epoch <= newest:
                raise RolledBack(f"{request.asset} has epoch {newest} already; this file is epoch {facts.epoch}")
            details = {"asset": request.asset, "digest": facts.digest, "epoch": facts.epoch}
            index = self._log.append(database, "register", details)
            self._keep(database, request.asset, facts, request.header, request.directory, index)
        return Registered(request.asset, facts.digest, facts.epoch, index)

    @staticmethod
    def _keep(
        database: sqlite3.Connection,
        asset: str,
        facts: sealed.PublicFacts,
        header: bytes,
        directory: bytes,
        index: int,
    ) -> None:
        row = (asset, facts.epoch, facts.digest, header, directory, index)
        database.execute("INSERT INTO asset VALUES (?, ?, ?, ?, ?, ?)", row)
        database.execute("INSERT OR REPLACE INTO head VALUES (?, ?)", (asset, facts.digest))

    def rollback(self, request: Rollback) -> Registered:
        """Put an earlier file of an asset into force; the next one that is registered is still above all epochs.

        The digest is the owner's pin: with header and directory it may also be a file that this state does not
        know, whoever signed it, as after a recovery from an old copy. Raises ReleaseRefused (``unknown_asset``),
        UnauthenticatedOrigin, RolledBack or a SealedError.
        """
        with self._state.transaction() as database:
            row = database.execute(
                "SELECT epoch FROM asset WHERE asset = ? AND digest = ?", (request.asset, request.digest)
            ).fetchone()
            if row is None and not request.directory:
                raise ReleaseRefused(
                    f"no file of {request.asset} is registered with this digest", code="unknown_asset",
                    hint="give the file itself with --file",
                )  # fmt: skip
            details = {"asset": request.asset, "digest": request.digest}
            index = self._log.append(database, "rollback", details)
            if row is None:
                epoch = self._adopt(database, request, index)
            else:
                epoch = row[0]
                database.execute("INSERT OR REPLACE INTO head VALUES (?, ?)", (request.asset, request.digest))
        return Registered(request.asset, request.digest, epoch, index)

    def _adopt(self, database: sqlite3.Connection, request: Rollback, index: int) -> int:
        facts = sealed.PublicFacts.parse(request.header, request.directory)
        if (facts.digest, facts.model_id) != (request.digest, request.asset):
            raise UnauthenticatedOrigin("this is not the file that the owner named", hint="")
        self._state.keys.unlock(facts).wipe()
        taken = database.execute(
            "SELECT 1 FROM asset WHERE asset = ? AND epoch = ?", (request.asset, facts.epoch)
        ).fetchone()
        if taken:
            raise RolledBack(f"another file of {request.asset} has epoch {facts.epoch}")
        self._keep(database, request.asset, facts, request.header, request.directory, index)
        return facts.epoch

    def newest(self, request: AssetRequest) -> Registered:
        """The file of an asset that is in force, for the owner. Raises UsageError when there is none."""
        with self._state.transaction() as database:
            row = database.execute(
                "SELECT asset, digest, epoch, log_index FROM asset JOIN head USING (asset, digest) WHERE asset = ?",
                (request.asset,),
            ).fetchone()
        if row is None:
            raise UsageError(f"no file is registered as {request.asset}")
        return Registered(row[0], bytes(row[1]), row[2], row[3])
