"""The authority: short-lived X.509 for attested workloads, so that engines that speak TLS are protected unmodified.

Spec: docs/spec/service.md, section 10.

A certificate is refused unless the caller has passed checks 1 to 6 of the broker, and then:

1. its job can be spelt in a SPIFFE name;
2. the request is PKCS #10 for a P-256 key, signed by that key;
3. the policy in force lets what is open go on for as long as a certificate must at least live.

Then it is logged, committed, and leaves. Names, lifetime and facts are the service's; the request gives a key only.

Each tier has a secret of its own, in the state, sealed to the service's own recipient key: it lies there no more
in the clear than that key does. From it comes a root for each job: a TLS engine compares roots and host names and
knows no jobs, so the CA file of one job admits no workload of another. A secret is replaced after 60 days; its
successor's roots are in the bundles for two hours before anything is issued under them.
"""

from __future__ import annotations

import hashlib
import sqlite3
from typing import Any

from attrs import field, frozen

from isolate.crypto import cbor
from isolate.crypto.secret import Secret
from isolate.crypto.spiffe import Grant, RootKey, dns_name, read_request, spiffe_id
from isolate.errors import ReleaseRefused, UsageError
from isolate.messages.base import Signed
from isolate.messages.certificate import (
    BACKDATED,
    LONGEST,
    SHORTEST,
    BundleRequest,
    Issued,
    IssueRequest,
    TrustBundle,
    trust_domain,
    write_facts,
)
from isolate.service.appraiser import Appraiser
from isolate.service.broker import Broker, Caller
from isolate.service.log import Log
from isolate.service.state import State

ROOT_LIFETIME = 90 * 86400  # seconds
RENEW_AFTER = 60 * 86400  # seconds, after which a successor is made
PUBLISH = 2 * 3600  # seconds in the bundles before first use: longer than a workload keeps a bundle
CLOCK_STEP = 86400  # seconds that the service's clock may be set back without a new secret
_ORGANIZATION = {"hardware": "isolate", "simulated": "isolate SIMULATED"}


@frozen
class _Generation:
    """One secret and when it was made (unix seconds)."""

    begin: int
    secret: Secret = field(repr=False)
    tier: str

    @property
    def end(self) -> int:
        return self.begin + ROOT_LIFETIME

    def root(self, name: str, job: str) -> tuple[RootKey, bytes]:
        """The key and the certificate of this job's root."""
        key, organization = RootKey(self.secret, self.tier, job), _ORGANIZATION[self.tier]
        begin = max(self.begin - CLOCK_STEP, 0)
        return key, key.certificate(
            trust_domain(name, self.tier), not_before=begin, not_after=self.end, organization=organization
        )


class Authority:
    def __init__(self, state: State, log: Log, appraiser: Appraiser, broker: Broker) -> None:
        self._state = state
        self._log = log
        self._appraiser = appraiser
        self._broker = broker
        self._opened: dict[bytes, Secret] = {}  # by box: opening one costs a decapsulation

    def certify(self, request: Signed) -> Issued:
        """A certificate for the caller's slot. Raises ReleaseRefused, MalformedError and what the broker raises."""
        asked = IssueRequest.parse(request.body)
        return self._broker.acting(request, lambda database, caller: self._issue(database, caller, asked))

    def bundle(self, request: BundleRequest) -> TrustBundle:
        """The roots of a job and tier, signed. Anyone may ask. Raises UsageError for a job that no name spells."""
        spiffe_id(trust_domain(self._state.name, request.tier), request.job, 0)
        with self._state.transaction() as database:
            return self._bundle(self._generations(database, request.tier), request.tier, request.job)

    def _bundle(self, generations: list[_Generation], tier: str, job: str) -> TrustBundle:
        certificate = self._state.certificate
        bundle = TrustBundle(
            service=certificate.name,
            lineage=certificate.lineage,
            tier=tier,
            job=job,
            roots=[one.root(self._state.name, job)[1] for one in generations],
            time=self._state.clock(),
        )
        return bundle.sign(self._state.release_key)

    def _issue(self, database: sqlite3.Connection, caller: Caller, asked: IssueRequest) -> Issued:
        result, now = caller.result, self._state.clock()
        slot, tier = result.slot, result.tier
        if slot is None:  # the broker lets nobody act without one
            raise ReleaseRefused("a certificate names a slot", code="job_unnameable")
        domain = trust_domain(self._state.name, tier)
        try:
            uri = spiffe_id(domain, slot.job, slot.rank)
        except UsageError as error:
            raise ReleaseRefused(error.message, code="job_unnameable") from None
        public = read_request(asked.csr)
        lifetime = min(asked.lifetime, LONGEST, self._appraiser.policy().max_stale)
        if lifetime < SHORTEST:
            raise ReleaseRefused("this policy lets nothing go on without the service", code="certificates_off")
        generations = self._generations(database, tier)
        signing = self._signing(generations, now)
        grant = Grant(
            uri=uri,
            dns=dns_name(domain, slot.job, slot.rank),
            common=result.instance.hex()[:32],
            facts=write_facts(
                tier=tier,
                instance=result.instance,
                evidence=result.evidence_digest,
                measurement=result.measurement,
                policy=result.policy_id,
                lineage=result.lineage,
                sequence=result.sequence,
                generation=slot.generation,
            ),
            not_before=now - BACKDATED,
            not_after=now + lifetime,
            organization=_ORGANIZATION[tier],
        )
        key, root = signing.root(self._state.name, slot.job)
        certificate = key.issue(root, public, grant)
        details = {
            "instance": result.instance,
            "name": uri,
            "key": hashlib.sha256(public).digest(),
            "certificate": hashlib.sha256(certificate).digest(),
            "not_after": grant.not_after,
        }
        index = self._log.append(database, "certificate", details)
        return Issued(certificate, self._bundle(generations, tier, slot.job).encode(), index)

    @staticmethod
    def _signing(generations: list[_Generation], now: int) -> _Generation:
        """The newest that has been in the bundles for long enough; at the very beginning, or after months of rest,
        there is none, and the oldest signs."""
        known = [one for one in generations if one.begin + PUBLISH <= now]
        return known[-1] if known else generations[0]

    def _generations(self, database: sqlite3.Connection, tier: str) -> list[_Generation]:
        """Those whose roots outlive a certificate of now, oldest first; a new one is made when it is time."""
        now, name = self._state.clock(), f"authority/{tier}"
        row = database.execute("SELECT value FROM meta WHERE key = ?", (name,)).fetchone()
        kept: list[list[Any]] = cbor.decode(bytes(row[0])) if row else []
        kept = [one for one in kept if one[0] - CLOCK_STEP <= now and now + LONGEST <= one[0] + ROOT_LIFETIME]
        if not kept or kept[-1][0] + RENEW_AFTER <= now:
            with Secret.generate(32) as fresh:
                box = self._state.keys.box(f"authority/{tier}/{now}", fresh)
            kept.append([now, box])
            database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, cbor.encode(kept)))
            self._log.append(database, "authority", {"tier": tier, "begin": now})
        return [_Generation(begin, self._open(tier, begin, box), tier) for begin, box in kept]

    def _open(self, tier: str, begin: int, box: bytes) -> Secret:
        if box not in self._opened:
            self._opened[box] = self._state.keys.open(f"authority/{tier}/{begin}", box)
        return self._opened[box]
