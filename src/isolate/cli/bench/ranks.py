"""Ranks of one job, each truly appraised on the simulated platform: what a process group needs to begin.

    >>> from isolate.cli.bench.ranks import Ranks
    >>> ranks = Ranks()
    >>> ranks.peers(1).expect(0).rank
    0

Who makes a Ranks before it forks has the same service and job in every process.
"""

from __future__ import annotations

import secrets

from attrs import field, frozen

from isolate.attestation.appraisal import appraise
from isolate.attestation.evidence import Envelope, KeyDigests, Runtime, Slot
from isolate.attestation.policy import Policy, Reference
from isolate.attestation.result import issue
from isolate.channel import Attested, Expect
from isolate.crypto.exchange import CurveKey
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey
from isolate.launch.root import SimulatedRoot

MEASUREMENT = bytes([1]) * 48


@frozen
class Member:
    """One rank's identity, and what it expects of the others. It is what ``pg_options=`` takes."""

    identity: Attested
    ranks: Ranks

    def attested(self) -> Attested:
        return self.identity

    def expect(self, rank: int | None) -> Expect:
        return self.ranks.expect(rank)


@frozen
class Ranks:
    """A service and a job. ``lineage`` is that of a policy which admits ``measurement`` and nothing else."""

    job: str = "bench"
    lineage: str = "bench"
    measurement: bytes = MEASUREMENT
    root: SimulatedRoot = field(factory=SimulatedRoot.generate)
    issuer: SigningKey = field(factory=SigningKey.generate)

    @property
    def now(self) -> int:
        """Unix seconds: of this moment, so that what is made later is of the present too."""
        return self.root.now()

    @property
    def policy(self) -> Policy:
        return Policy(
            lineage=self.lineage,
            sequence=1,
            references=(Reference(name="bench", kind="simulated", registers={"PCR0": self.measurement}),),
            simulated_anchors=(self.root.fingerprint,),
            INSECURE_accept_simulated=True,
        )

    def attested(self, rank: int, *, measured: bytes | None = None) -> Attested:
        """A rank that was measured as ``measured``. Raises AppraisalRefused for what the policy does not admit."""
        static, sign = Secret.generate(32), SigningKey.generate()
        keys = KeyDigests.of({"channel": CurveKey(static).public, "sign": sign.verifying_key.to_bytes()})
        nonce, slot = secrets.token_bytes(32), Slot(self.job, rank, 1)
        runtime = Runtime(kind="simulated", nonce=nonce, keys_digest=keys.digest, purpose="bench", slot=slot)
        registers = {0: measured or self.measurement, 1: bytes([2]) * 48, 2: bytes([3]) * 48}
        evidence = self.root.module(f"rank-{rank}").document(registers, runtime.binding(), nonce)
        envelope = Envelope("simulated", evidence, (), runtime)
        appraisal = appraise(envelope, policy=self.policy, nonce=nonce, at=self.now, slot=slot)
        token = issue(appraisal, key=self.issuer, issuer="bench", now=self.now, slot=slot)
        return Attested(token, keys, static, sign)

    def expect(self, rank: int | None) -> Expect:
        return Expect(
            job=self.job, rank=rank, issuer_key=self.issuer.verifying_key.ed25519, clock=lambda: self.now,
            lineage=self.lineage, least_sequence=1, INSECURE_accept_simulated=True,
        )  # fmt: skip

    def peers(self, rank: int) -> Member:
        return Member(self.attested(rank), self)
