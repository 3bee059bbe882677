"""Assets and the release of their keys.

Spec: docs/spec/service.md, sections 3 to 5.

A release is refused unless, in this order:

1. the request is signed, for this service;
2. the result token is ours, has not expired, and is of the policy in force;
3. the request's key is the one that instance attested;
4. the instance holds its slot: no later one has taken it;
5. its measurement still stands in the policy, unrevoked;
6. the request's nonce is new;
7. the file is registered, and is the newest epoch of its asset;
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
from isolate.attestation.result import AttestationResult
from isolate.crypto import cbor
from isolate.crypto.signing import Purpose
from isolate.errors import ReleaseRefused, ResultRefused, RolledBack, UnauthenticatedOrigin, UsageError
from isolate.messages.attest import Registered, RegisterRequest, Release, ReleaseContext, ReleaseRequest
from isolate.messages.base import Signed
from isolate.messages.owner import AssetRequest, AssetRule, Done
from isolate.sealed.recipients import compartment_keys, open_file_key
from isolate.service.appraiser import Appraiser
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
        key = request.verify(Purpose.ENCLAVE_REQUEST, self._state.name)
        policy, now = self._appraiser.policy(), self._state.clock()
        result = results.verify(
            request.token,
            issuer_key=self._state.result_key.verifying_key.ed25519,
            now=now,
            INSECURE_accept_simulated=policy.INSECURE_accept_simulated,
        )
        if result.policy_id != policy.id:
            raise ResultRefused("this result was made under an earlier policy", code="policy_changed")
        row = database.execute("SELECT keys FROM instance WHERE instance = ?", (result.instance,)).fetchone()
        if row is None:
            raise ResultRefused("this instance did not attest here", code="unknown_instance")
        keys: dict[str, bytes] = cbor.decode(bytes(row[0]))
        if keys["sign"] != key.to_bytes():
            raise ResultRefused("this result was given to another instance", code="stolen_result")
        slot = result.slot
        holder = (
            slot
            and database.execute(
                "SELECT instance FROM slot WHERE job = ? AND rank = ?", (slot.job, slot.rank)
            ).fetchone()
        )
        # By instance and not by generation: what a renewal overtakes on its way stays good until it expires.
        if not holder or bytes(holder[0]) != result.instance:
            raise ReleaseRefused("a later instance holds this slot", code="slot_retired")
        # Several references may share a name, while an old and a new measurement both run.
        named = [one for one in policy.references if one.name == result.measurement]
        if named and not any(one.valid_at(now) and not one.revoked_by(now) for one in named):
            raise ReleaseRefused("this measurement is no longer admitted", code="measurement_revoked")
        return Caller(result, keys, key.to_bytes())

    def release(self, request: Signed) -> Release:
        asked = ReleaseRequest.parse(request.body)
        context, keys, hpke = self.acting(request, lambda database, caller: self._open(database, caller, asked))
        return Release.make(context, keys, hpke, self._state.release_key)

    def _open(
        self, database: sqlite3.Connection, caller: Caller, asked: ReleaseRequest
    ) -> tuple[ReleaseContext, dict[str, bytes], bytes]:
        """Checks 7 and 8, the keys, and the log entry."""
        row = database.execute(
            "SELECT asset, epoch, header, directory FROM asset WHERE digest = ?", (asked.digest,)
        ).fetchone()
        if row is None:
            raise ReleaseRefused("no asset is registered with this digest", code="unknown_asset")
        asset, epoch, header, directory = row
        (newest,) = database.execute("SELECT max(epoch) FROM asset WHERE asset = ?", (asset,)).fetchone()
        if epoch != newest:
            raise RolledBack(f"{asset} has epoch {newest}; this file is epoch {epoch}")
        self.allow(database, asset, caller.result.measurement, "readers")
        facts = sealed.PublicFacts.parse(bytes(header), bytes(directory))
        with open_file_key(facts, self._state.identity) as file_key:
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
    def allow(database: sqlite3.Connection, asset: str, measurement: str, column: str) -> None:
        """Raises ReleaseRefused unless the asset's rule names this measurement among its readers or writers."""
        row = database.execute("SELECT readers, writers FROM rule WHERE asset = ?", (asset,)).fetchone()
        names: list[Any] = cbor.decode(bytes(row[0 if column == "readers" else 1])) if row else []
        if measurement not in names:
            raise ReleaseRefused(f"the owner's rule for {asset} does not name {measurement}", code="rule_denied")

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
        open_file_key(facts, self._state.identity).wipe()
        with self._state.transaction() as database:
            if measurement is not None:
                self.allow(database, request.asset, measurement, "writers")
            (newest,) = database.execute(
                "SELECT max(epoch) FROM asset WHERE asset = ?", (request.asset,)
            ).fetchone()
            if newest is not None and facts.epoch <= newest:
                raise RolledBack(f"{request.asset} has epoch {newest} already; this file is epoch {facts.epoch}")
            details = {"asset": request.asset, "digest": facts.digest, "epoch": facts.epoch}
            index = self._log.append(database, "register", details)
            database.execute(
                "INSERT INTO asset VALUES (?, ?, ?, ?, ?, ?)",
                (request.asset, facts.epoch, facts.digest, request.header, request.directory, index),
            )
        return Registered(request.asset, facts.digest, facts.epoch, index)

    def newest(self, request: AssetRequest) -> Registered:
        """The newest epoch of an asset, for the owner. Raises UsageError when there is none."""
        with self._state.transaction() as database:
            row = database.execute(
                "SELECT asset, digest, epoch, log_index FROM asset WHERE asset = ? ORDER BY epoch DESC LIMIT 1",
                (request.asset,),
            ).fetchone()
        if row is None:
            raise UsageError(f"no file is registered as {request.asset}")
        return Registered(row[0], bytes(row[1]), row[2], row[3])
