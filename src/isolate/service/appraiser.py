"""Challenge and attest: a fresh nonce and a slot out, evidence in, a result token back.

Spec: docs/spec/service.md, section 2.

The numbered checks are those of ``isolate.attestation.appraisal``; before them stand two of the service:

1. the nonce was issued by this service, has not expired, and has not been used (it is used up here);
2. the public keys are those whose digests the evidence carries.
"""

from __future__ import annotations

from isolate.attestation import result as results
from isolate.attestation.appraisal import appraise
from isolate.attestation.evidence import Envelope, KeyDigests, Slot
from isolate.attestation.policy import Policy, SignedPolicy
from isolate.crypto import cbor
from isolate.crypto.signing import VerifyingKey
from isolate.errors import AppraisalRefused, MalformedError, RefusedError, UsageError
from isolate.messages.attest import AttestAnswer, AttestRequest, Challenge, ChallengeRequest
from isolate.messages.owner import Done, Evidence, EvidenceRequest, PolicyUpdate
from isolate.service.log import Log
from isolate.service.state import NONCE_LIFETIME, State

KEY_PURPOSES = frozenset({"hpke", "sign", "channel"})
MAX_JOB = 128  # bytes of UTF-8
MAX_RANK = 65535


class Appraiser:
    def __init__(self, state: State, log: Log) -> None:
        self._state = state
        self._log = log

    def policy(self) -> Policy:
        """The policy in force. Raises AppraisalRefused when the owner has given none."""
        with self._state.transaction() as database:
            row = database.execute("SELECT signed FROM policy ORDER BY sequence DESC LIMIT 1").fetchone()
        if row is None:
            raise AppraisalRefused("the owner has set no policy", code="no_policy")
        return SignedPolicy.open(bytes(row[0]), signed_by=self._state.owner).policy

    def set_policy(self, update: PolicyUpdate) -> Done:
        """Put a policy into force. Raises RefusedError for a sequence that is not higher, or another lineage."""
        lineage = self._state.certificate.lineage
        policy = SignedPolicy.open(update.policy, signed_by=self._state.owner, lineage=lineage).policy
        with self._state.transaction() as database:
            (last,) = database.execute("SELECT max(sequence) FROM policy").fetchone()
            if last is not None and policy.sequence <= last:
                raise RefusedError(f"a policy of sequence {last} is in force", code="policy_rollback")
            database.execute("INSERT INTO policy VALUES (?, ?)", (policy.sequence, update.policy))
            return Done(self._log.append(database, "policy", {"policy": policy.id, "sequence": policy.sequence}))

    def challenge(self, request: ChallengeRequest) -> Challenge:
        """Issue a nonce and the next generation of a slot. The last generation is retired when this one attests."""
        if len(request.client_nonce) != 32:
            raise MalformedError("a client nonce is 32 bytes")
        if not (0 < len(request.job.encode()) <= MAX_JOB and 0 <= request.rank <= MAX_RANK):
            raise UsageError("a job has a name of 1 to 128 bytes, and a rank is 0 to 65535")
        nonce, now = self._state.new_nonce(), self._state.clock()
        with self._state.transaction() as database:
            database.execute("DELETE FROM challenge WHERE expires < ?", (now,))
            (generation,) = database.execute(
                "INSERT INTO slot VALUES (?, ?, 1, 0) "
                "ON CONFLICT (job, rank) DO UPDATE SET issued = issued + 1 RETURNING issued",
                (request.job, request.rank),
            ).fetchone()
            database.execute(
                "INSERT INTO challenge VALUES (?, ?, ?, ?, ?)",
                (nonce, request.job, request.rank, generation, now + NONCE_LIFETIME),
            )
        challenge = Challenge(
            client_nonce=request.client_nonce,
            nonce=nonce,
            job=request.job,
            rank=request.rank,
            generation=generation,
            time=now,
            certificate=self._state.certificate.encode(),
        )
        return challenge.sign(self._state.release_key)

    def attest(self, request: AttestRequest) -> AttestAnswer:
        """Appraise evidence. Raises AppraisalRefused or EvidenceRefused; the nonce is used up either way."""
        envelope = Envelope.parse(request.envelope)
        runtime = envelope.runtime
        now = self._state.clock()
        slot = self._use_challenge(runtime.nonce, now)
        if set(request.keys) != KEY_PURPOSES:
            raise AppraisalRefused("an enclave has keys for hpke, sign and channel", code="keys_mismatch")
        if KeyDigests.of(request.keys).digest != runtime.keys_digest:
            raise AppraisalRefused("these are not the keys that the evidence names", code="keys_mismatch")
        VerifyingKey.from_bytes(request.keys["sign"])
        policy = self.policy()
        appraisal = appraise(envelope, policy=policy, nonce=runtime.nonce, at=now, slot=slot)
        if not appraisal.accepted:
            with self._state.transaction() as database:
                failed = [check.name for check in appraisal.checks if not check.passed]
                self._log.append(database, "attestation refused", {"job": slot.job, "failed": failed})
            appraisal.require()
        token = results.issue(appraisal, key=self._state.result_key, issuer=self._state.name, now=now, slot=slot)
        accepted = results.verify(
            token,
            issuer_key=self._state.result_key.verifying_key.ed25519,
            now=now,
            INSECURE_accept_simulated=policy.INSECURE_accept_simulated,
        )
        with self._state.transaction() as database:
            database.execute(
                "UPDATE slot SET current = max(current, ?) WHERE job = ? AND rank = ?",
                (slot.generation, slot.job, slot.rank),
            )
            database.execute(
                "INSERT OR REPLACE INTO instance VALUES (?, ?, ?, ?, ?)",
                (accepted.instance, request.envelope, cbor.encode(request.keys), accepted.measurement, now),
            )
            details = {"instance": accepted.instance, "measurement": accepted.measurement, "policy": policy.id}
            self._log.append(database, "attestation", details)
        return AttestAnswer(token)

    def _use_challenge(self, nonce: bytes, now: int) -> Slot:
        with self._state.transaction() as database:
            row = database.execute(
                "DELETE FROM challenge WHERE nonce = ? RETURNING job, rank, generation, expires", (nonce,)
            ).fetchone()
        if row is None or row[3] < now:
            raise AppraisalRefused("this nonce was not issued here, was used, or has expired", code="nonce_refused")
        return Slot(row[0], row[1], row[2])

    def evidence(self, request: EvidenceRequest) -> Evidence:
        """The recorded envelope of an instance, for the owner."""
        with self._state.transaction() as database:
            row = database.execute(
                "SELECT envelope FROM instance WHERE instance = ?", (request.instance,)
            ).fetchone()
        if row is None:
            raise UsageError("no such instance attested here")
        return Evidence(bytes(row[0]))
