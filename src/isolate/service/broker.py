"""Assets and the release of their keys.

Spec: docs/spec/service.md, sections 3 to 5.

A release is refused unless, in this order:

1. the request is signed for this service, and its nonce is new;
2. the result token is ours, has not expired, and is of the policy in force;
3. the request's key is the one that instance attested;
4. the instance holds the current generation of its slot;
5. its measurement still stands in the policy, unrevoked;
6. the file is registered, and is the newest epoch of its asset;
7. the asset's rule lets this measurement read it.

Then the keys are unwrapped, the release is logged and committed, and only then does it leave.
"""

from __future__ import annotations

import sqlite3
from typing import Any

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


@frozen
class Caller:
    """An attested instance whose request was verified (checks 1 to 5). Only ``Broker.caller`` makes one."""

    result: AttestationResult
    keys: dict[str, bytes]
    signing_key: bytes


class Broker:
    def __init__(self, state: State, log: Log, appraiser: Appraiser) -> None:
        self._state = state
        self._log = log
        self._appraiser = appraiser

    def caller(self, request: Signed) -> Caller:
        """Checks 1 to 5. Raises RefusedError, ResultRefused or ReleaseRefused."""
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
        with self._state.transaction() as database:
            self._state.use_nonce(database, request.nonce)
            row = database.execute("SELECT keys FROM instance WHERE instance = ?", (result.instance,)).fetchone()
            slot = result.slot
            current = database.execute(
                "SELECT 1 FROM slot WHERE job = ? AND rank = ? AND current = ?",
                (slot.job, slot.rank, slot.generation) if slot else ("", -1, -1),
            ).fetchone()
        if row is None:
            raise ResultRefused("this instance did not attest here", code="unknown_instance")
        keys: dict[str, bytes] = cbor.decode(bytes(row[0]))
        if keys["sign"] != key.to_bytes():
            raise ResultRefused("this result was given to another instance", code="stolen_result")
        if current is None:
            raise ReleaseRefused("a later generation holds this slot", code="slot_retired")
        reference = next((one for one in policy.references if one.name == result.measurement), None)
        if reference is not None and (reference.revoked_by(now) or not reference.valid_at(now)):
            raise ReleaseRefused("this measurement is no longer admitted", code="measurement_revoked")
        return Caller(result, keys, key.to_bytes())

    def release(self, request: Signed) -> Release:
        caller, asked = self.caller(request), ReleaseRequest.parse(request.body)
        with self._state.transaction() as database:
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
            released = compartment_keys(
                open_file_key(facts, self._state.identity), facts, asked.compartments or None
            )
            details = {
                "asset": asset,
                "digest": asked.digest,
                "compartments": sorted(released.keys),
                "instance": caller.result.instance,
                "measurement": caller.result.measurement,
            }
            context = ReleaseContext(
                asset=asset,
                digest=asked.digest,
                epoch=epoch,
                compartments=sorted(released.keys),
                nonce=asked.nonce,
                instance=caller.result.instance,
                policy=caller.result.policy_id,
                recipients=[recipient.raw for recipient in [self._state.identity.recipient, *self._state.recovery]],
                log_index=self._log.append(database, "release", details),
                time=self._state.clock(),
            )
        keys = {name: bytes(key.expose()) for name, key in released.keys.items()}
        return Release.make(context, keys, caller.keys["hpke"], self._state.release_key)

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
        open_file_key(facts, self._state.identity)
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
