"""Certificates for attested workloads: asking for one, the roots to trust, and the check of a peer's.

    >>> trust_domain("Acme", "simulated")
    'acme.simulated'

Spec: docs/spec/service.md, section 10. There stands too what a certificate does not bind; the first of it: the
peer at the other end of TLS is whoever holds the private key, wherever that is now.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from attrs import evolve, field, frozen

from isolate.crypto import cbor, x509
from isolate.crypto.signing import Purpose, SigningKey
from isolate.crypto.spiffe import Leaf, is_root, read_leaf
from isolate.errors import CertificateRefused, MalformedError, UsageError
from isolate.messages.attest import ServiceCertificate
from isolate.messages.base import Limit, Message, check_size

MAX_LIFETIME = 3600  # seconds of a certificate's validity, beginning and end included
BACKDATED = 60  # seconds: the clocks of peers differ
LONGEST = MAX_LIFETIME - BACKDATED  # seconds that can be asked for
SHORTEST = 2
MAX_ROOTS = 8
BUNDLE_AGE = 3600  # seconds that a bundle is good for
MAX_AHEAD = 30  # seconds between the clocks of service and consumer

_TIERS = ("hardware", "simulated")
_FACTS: dict[str, type] = {
    "version": int, "tier": str, "instance": bytes, "evidence": bytes, "measurement": str, "policy": bytes,
    "lineage": str, "sequence": int, "generation": int,
}  # fmt: skip
_MADE_HERE = object()


def trust_domain(service: str, tier: str) -> str:
    """The trust domain of a service: one for hardware results, another for simulated ones."""
    return service.lower() + (".simulated" if tier == "simulated" else "")


@frozen
class IssueRequest(Message):
    """Body of a Signed request by an attested instance. ``csr`` is PKCS #10, of which only the key counts.

    ``lifetime`` in seconds, 2 to 3540; the service may give less.
    """

    TYPE = "issue-request"
    csr: bytes
    lifetime: Annotated[int, Limit(SHORTEST, LONGEST)]


@frozen
class Issued(Message):
    """``certificate`` is X.509 in DER, ``bundle`` an encoded TrustBundle of the same job and tier."""

    TYPE = "issued"
    certificate: bytes
    bundle: bytes
    log_index: int


@frozen
class BundleRequest(Message):
    """Anyone may ask whom to trust as a workload of ``job``; the answer is a TrustBundle."""

    TYPE = "bundle-request"
    job: str
    tier: str

    def __attrs_post_init__(self) -> None:
        if self.tier not in _TIERS:
            raise MalformedError("a tier is hardware or simulated")


@frozen
class TrustBundle(Message):
    """The service says: these roots, and no others, vouch for the workloads of this job. Good for an hour.

    ``roots`` are certificates in DER, of this job and tier alone, so that a TLS engine that is given them takes
    no workload of another job, and none that is simulated where hardware was asked for.
    """

    TYPE = "trust-bundle"
    service: str
    lineage: str
    tier: str
    job: str
    roots: list[bytes]
    time: int
    signature: bytes = field(default=b"", repr=False)

    def _signed(self) -> bytes:
        return cbor.encode([self.service, self.lineage, self.tier, self.job, self.roots, self.time])

    def sign(self, key: SigningKey) -> TrustBundle:
        return evolve(self, signature=key.sign(Purpose.TRUST_BUNDLE, self._signed()))

    def verify(
        self, certificate: ServiceCertificate, *, job: str, now: int, INSECURE_accept_simulated: bool = False
    ) -> Trust:
        """Whom to trust as a workload of ``job``, or CertificateRefused. ``now`` is unix seconds.

        1. The certified service signed it, under its own name and lineage.
        2. It is for this job.
        3. It is of now: at most an hour old, and not from the future.
        4. It is for hardware results; for simulated ones only when asked for.
        5. It holds 1 to 8 roots.
        """
        if (self.service, self.lineage) != (certificate.name, certificate.lineage) or not (
            certificate.release_key.verify(Purpose.TRUST_BUNDLE, self._signed(), self.signature)
        ):
            raise CertificateRefused("these roots are not signed by the certified service")
        if self.job != job:
            raise CertificateRefused("these roots are for another job", code="certificate_job")
        if not -MAX_AHEAD <= now - self.time < BUNDLE_AGE:
            raise CertificateRefused("these roots are not of now: ask for them again", code="certificate_expired")
        if self.tier not in _TIERS or (self.tier == "simulated" and not INSECURE_accept_simulated):
            raise CertificateRefused("these roots are for simulated workloads", code="certificate_simulated")
        if not 1 <= len(self.roots) <= MAX_ROOTS or not all(is_root(one) for one in self.roots):
            raise CertificateRefused(f"a bundle holds 1 to {MAX_ROOTS} roots")
        return Trust(self, INSECURE_accept_simulated, _MADE_HERE)


@frozen(kw_only=True)
class WorkloadPeer:
    """Whom a certificate names, once it verifies: made only by ``Trust.peer``.

    instance, evidence and policy are 32 bytes: the instance's id, the digest of the evidence that was appraised,
    the policy it was appraised under. Times are unix seconds.
    """

    spiffe: str
    job: str
    rank: int
    generation: int
    instance: bytes
    evidence: bytes
    tier: Literal["hardware", "simulated"]
    measurement: str
    policy: bytes
    sequence: int
    public: bytes = field(repr=False)
    not_before: int
    expires: int
    made: object = field(repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self.made is not _MADE_HERE:
            raise UsageError("a WorkloadPeer is made by Trust.peer only")
        object.__setattr__(self, "made", None)


@frozen
class Trust:
    """A verified bundle: made only by ``TrustBundle.verify``."""

    bundle: TrustBundle
    _insecure: bool = field(repr=False)
    _made: object = field(repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self._made is not _MADE_HERE:
            raise UsageError("a Trust is made by TrustBundle.verify only")
        object.__setattr__(self, "_made", None)

    def pem(self) -> bytes:
        """The roots as a TLS engine takes them: its CA file."""
        return b"".join(x509.pem(one) for one in self.bundle.roots)

    def peer(
        self,
        certificate: bytes,
        *,
        now: int,
        rank: int | None = None,
        instance: bytes | None = None,
        least_sequence: int = 0,
    ) -> WorkloadPeer:
        """Whom this certificate (DER or PEM, as the TLS engine shows its peer's) names, or CertificateRefused.

        1. It is a workload's certificate, and one of the roots issued it.
        2. It is valid at ``now``, and for no longer than an hour in all.
        3. Its name is of the bundle's trust domain and job; of ``rank``, when one is asked for.
        4. Its facts are well formed, of the bundle's tier and lineage, and not of simulated evidence unless that
           was asked for.
        5. It is of this ``instance``, when one is asked for.
        6. It was issued under a policy of at least this sequence.

        What the TLS handshake proved is the engine's: that the peer holds the certificate's key.
        """
        leaf = self._leaf(certificate, now)
        domain = trust_domain(self.bundle.service, self.bundle.tier)
        if (leaf.domain, leaf.job) != (domain, self.bundle.job) or rank not in (None, leaf.rank):
            raise CertificateRefused(f"this certificate is for {leaf.uri}", code="certificate_name")
        facts = _read_facts(leaf.facts)
        if (facts["tier"], facts["lineage"]) != (self.bundle.tier, self.bundle.lineage):
            raise CertificateRefused("this certificate is of another tier or lineage", code="certificate_facts")
        if facts["tier"] == "simulated" and not self._insecure:
            raise CertificateRefused("this certificate is of a simulated workload", code="certificate_simulated")
        if instance not in (None, facts["instance"]):
            raise CertificateRefused("this certificate is of another instance", code="certificate_instance")
        if facts["sequence"] < least_sequence:
            raise CertificateRefused("this certificate is of an earlier policy", code="certificate_policy")
        named = ("generation", "instance", "evidence", "tier", "measurement", "policy", "sequence")
        return WorkloadPeer(
            spiffe=leaf.uri,
            job=leaf.job,
            rank=leaf.rank,
            public=leaf.public,
            not_before=leaf.not_before,
            expires=leaf.not_after,
            made=_MADE_HERE,
            **{name: facts[name] for name in named},
        )

    def _leaf(self, certificate: bytes, now: int) -> Leaf:
        try:
            leaf = read_leaf(certificate)
            roots = [x509.load(one)[0] for one in self.bundle.roots]
            issuer = next((one for one in roots if x509.issued_by(leaf.certificate, one)), None)
            if issuer is None:
                raise CertificateRefused("none of the roots issued this certificate", code="certificate_root")
            x509.verify_chain([leaf.certificate, issuer], at=now)
        except MalformedError as error:
            raise CertificateRefused(error.message) from None
        if leaf.not_after - leaf.not_before > MAX_LIFETIME:
            raise CertificateRefused("this certificate lives for more than an hour")
        return leaf


def write_facts(**facts: Any) -> bytes:
    """What our extension holds (section 10.3): deterministic CBOR."""
    return cbor.encode({"version": 1, **facts})


def _read_facts(data: bytes) -> dict[str, Any]:
    try:
        facts = cbor.record(data, _FACTS, max_size=1024)
        for name in ("instance", "evidence", "policy"):
            check_size(name, facts[name], 32)
    except MalformedError:
        raise CertificateRefused("the facts in this certificate are malformed", code="certificate_facts") from None
    if facts["version"] != 1:
        raise CertificateRefused("the facts in this certificate are of another version", code="certificate_facts")
    return facts
