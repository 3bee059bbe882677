"""Challenge and attest: a nonce and a slot out, evidence in, a result token back.

Spec: docs/spec/service.md, section 2.

Evidence is refused unless, in this order:

1. its nonce was issued by this running service, for this slot, and has not expired;
2. the public keys are those whose digests the evidence carries;
3. every numbered check of ``isolate.attestation.appraisal`` passes under the policy in force;
4. that policy is still in force at the commit;
5. nobody has attested this generation of the slot: that is what uses the nonce up;
6. this instance has not lost its slot to a later one.

A challenge leaves nothing behind: the nonce itself says, under a key of this process, what it was issued for. So
strangers fill no table, burn nobody's nonce, and no nonce outlives the process or comes back with an old state.
"""

from __future__ import annotations

import hmac
import secrets
import sqlite3
import struct
from hashlib import sha256

from isolate.attestation import result as results
from isolate.attestation.appraisal import Appraisal, appraise
from isolate.attestation.evidence import Envelope, KeyDigests, Slot
from isolate.attestation.policy import Policy, SignedPolicy
from isolate.crypto import cbor
from isolate.crypto.secret import Secret
from isolate.errors import AppraisalRefused, RefusedError, UsageError
from isolate.messages.attest import AttestAnswer, AttestRequest, Challenge, ChallengeRequest
from isolate.messages.owner import Done, Evidence, EvidenceRequest, PolicyUpdate
from isolate.service.log import Log
from isolate.service.state import State

KEY_PURPOSES = frozenset({"hpke", "sign", "channel"})
NONCE_LIFETIME = 300  # seconds
_NONCE = struct.Struct(">Q8s16s")  # when it expires, random, tag


class Appraiser:
    def __init__(self, state: State, log: Log) -> None:
        self._state = state
        self._log = log
        self._nonces = Secret.generate(32)
        self._opened: tuple[bytes, Policy] | None = None
        self._identified: tuple[Policy, bytes] | None = None

    def policy(self) -> Policy:
        """The policy in force. Raises AppraisalRefused when the owner has given none."""
        with self._state.transaction() as database:
            row = database.execute("SELECT signed FROM policy ORDER BY sequence DESC LIMIT 1").fetchone()
        if row is None or not row[0]:  # a recovery leaves the sequence, and takes the policy out of force
            raise AppraisalRefused("the owner has set no policy", code="no_policy")
        signed = bytes(row[0])
        # Verified once for each that comes into force: it is looked up anew, by its bytes, for every request.
        # Into a name of our own: another thread may put a newer one there meanwhile.
        opened = self._opened
        if opened is None or opened[0] != signed:
            opened = self._opened = (signed, SignedPolicy.open(signed, signed_by=self._state.owner).policy)
        return opened[1]

    def policy_id(self) -> bytes:
        """The id of the policy in force: asked with every request of an enclave, so it is worked out once."""
        policy = self.policy()
        identified = self._identified
        if identified is None or identified[0] is not policy:
            identified = self._identified = (policy, policy.id)
        return identified[1]

    def set_policy(self, update: PolicyUpdate) -> Done:
        """Put a policy into force. Raises RefusedError for a sequence that is not higher, or another lineage."""
        lineage = self._state.certificate.lineage
        policy = SignedPolicy.open(update.policy, signed_by=self._state.owner, lineage=lineage).policy
        with self._state.transaction() as database:
            (last,) = database.execute("SELECT max(sequence) FROM policy").fetchone()
            if last is not None and policy.sequence <= last:
                raise RefusedError(f"a policy of sequence {last} was in force already", code="policy_rollback")
            database.execute("INSERT INTO policy VALUES (?, ?)", (policy.sequence, update.policy))
            return Done(self._log.append(database, "policy", {"policy": policy.id, "sequence": policy.sequence}))

    def challenge(self, request: ChallengeRequest) -> Challenge:
        """Offer a nonce for the next generation of a slot. Nothing is written: who attests first has it.

        Raises MalformedError for a job or rank that no slot has.
        """
        slot = Slot(request.job, request.rank, 1)
        with self._state.transaction() as database:
            row = database.execute(
                "SELECT generation FROM slot WHERE job = ? AND rank = ?", (slot.job, slot.rank)
            ).fetchone()
        if row:
            slot = Slot(slot.job, slot.rank, row[0] + 1)
        now = self._state.clock()
        expires, salt = now + NONCE_LIFETIME, secrets.token_bytes(8)
        challenge = Challenge(
            client_nonce=request.client_nonce,
            nonce=_NONCE.pack(expires, salt, self._tag(expires, salt, slot)),
            job=slot.job,
            rank=slot.rank,
            generation=slot.generation,
            time=now,
            certificate=self._state.certificate.encode(),
        )
        return challenge.sign(self._state.release_key)

    def _tag(self, expires: int, salt: bytes, slot: Slot) -> bytes:
        body = cbor.encode([expires, salt, slot.to_value()])
        return hmac.digest(bytes(self._nonces.expose()), b"isolate/v1/service/nonce\0" + body, sha256)[:16]

    def _check_nonce(self, nonce: bytes, slot: Slot | None, now: int) -> Slot:
        refusal = AppraisalRefused(
            "this nonce was not issued here for this slot, was used, or has expired", code="nonce_refused"
        )
        if slot is None or len(nonce) != _NONCE.size:
            raise refusal
        expires, salt, tag = _NONCE.unpack(nonce)
        if not hmac.compare_digest(tag, self._tag(expires, salt, slot)) or now >= expires:
            raise refusal
        return slot

    def attest(self, request: AttestRequest) -> AttestAnswer:
        """Appraise evidence. Raises AppraisalRefused, or MalformedError for what is no envelope."""
        envelope, now = Envelope.parse(request.envelope), self._state.clock()
        runtime = envelope.runtime
        slot = self._check_nonce(runtime.nonce, runtime.slot, now)
        self._check_keys(request.keys, runtime.keys_digest)
        policy = self.policy()
        appraisal = appraise(envelope, policy=policy, nonce=runtime.nonce, at=now, slot=slot)
        if not appraisal.accepted:
            self._log_refusal(appraisal, slot)
            appraisal.require()
        token = results.issue(appraisal, key=self._state.result_key, issuer=self._state.name, now=now, slot=slot)
        accepted = results.verify(
            token,
            issuer_key=self._state.result_key.verifying_key.ed25519,
            now=now,
            INSECURE_accept_simulated=policy.INSECURE_accept_simulated,
        )
        measured = dict(appraisal.claims.measurements) if appraisal.claims else {}
        with self._state.transaction() as database:
            if self.policy().id != policy.id:
                raise AppraisalRefused("another policy came into force meanwhile", code="policy_changed")
            self._take_slot(database, slot, accepted.instance)
            database.execute(
                "INSERT OR REPLACE INTO instance VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    accepted.instance,
                    request.envelope,
                    cbor.encode(request.keys),
                    accepted.measurement,
                    accepted.kind,
                    cbor.encode(measured),
                    now,
                ),
            )
            details = {"instance": accepted.instance, "measurement": accepted.measurement, "policy": policy.id}
            self._log.append(database, "attestation", {**details, "slot": slot.to_value()})
        return AttestAnswer(token)

    @staticmethod
    def _check_keys(keys: dict[str, bytes], digest: bytes) -> None:
        try:
            same = set(keys) == KEY_PURPOSES and hmac.compare_digest(KeyDigests.of(keys).digest, digest)
        except UsageError:  # a key of the wrong length
            same = False
        if not same:
            raise AppraisalRefused(
                "these are not the keys for hpke, sign and channel that the evidence names", code="keys_mismatch"
            )

    @staticmethod
    def _take_slot(database: sqlite3.Connection, slot: Slot, instance: bytes) -> None:
        row = database.execute(
            "SELECT generation, instance FROM slot WHERE job = ? AND rank = ?", (slot.job, slot.rank)
        ).fetchone()
        generation, holder = (row[0], bytes(row[1])) if row else (0, None)
        if slot.generation <= generation:
            code = "nonce_refused" if holder == instance else "slot_taken"
            raise AppraisalRefused("this generation of the slot was attested already", code=code)
        # Renewing, an instance keeps its slot. Once a later one has taken it, it never comes back, not to another
        # slot either: else two twins could hold one rank in turns.
        known = database.execute("SELECT 1 FROM instance WHERE instance = ?", (instance,)).fetchone()
        if known and holder != instance:
            raise AppraisalRefused("another instance holds this slot now", code="slot_retired")
        database.execute(
            "INSERT OR REPLACE INTO slot VALUES (?, ?, ?, ?)", (slot.job, slot.rank, slot.generation, instance)
        )

    def _log_refusal(self, appraisal: Appraisal, slot: Slot) -> None:
        """Into the log only when it comes from a genuine platform: anyone can send bytes."""
        failed = [check.name for check in appraisal.refusals]
        if not {"authentic", "binding", "simulated"} & set(failed):
            with self._state.transaction() as database:
                details = {"slot": slot.to_value(), "failed": failed}
                self._log.refused(database, "attestation refused", b"attestation", failed[0], details)

    def evidence(self, request: EvidenceRequest) -> Evidence:
        """The recorded envelope of an instance, for the owner."""
        with self._state.transaction() as database:
            row = database.execute(
                "SELECT envelope FROM instance WHERE instance = ?", (request.instance,)
            ).fetchone()
        if row is None:
            raise UsageError("no such instance attested here")
        return Evidence(bytes(row[0]))
