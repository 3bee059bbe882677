"""Certificates of attested workloads: who gets one, what it says, and who takes it (docs/spec/service.md, 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from isolate.attestation.evidence import instance_id
from isolate.crypto import cbor, spiffe, x509
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey
from isolate.enclave import certificates
from isolate.errors import CertificateRefused, IsolateError, MalformedError, UsageError
from isolate.messages import certificate as messages
from isolate.messages.certificate import (
    BundleRequest,
    Issued,
    IssueRequest,
    Trust,
    TrustBundle,
    WorkloadPeer,
    write_facts,
)
from isolate.service import authority

JOB = "acme/job"


def bundle(realm: Any, tier: str = "simulated", job: str = JOB) -> TrustBundle:
    answer: TrustBundle = realm.post("", "bundle", BundleRequest(job, tier), TrustBundle)
    return answer


def trust(realm: Any, tier: str = "simulated", job: str = JOB, **options: Any) -> Trust:
    options = {"now": realm.clock(), "INSECURE_accept_simulated": True} | options
    return bundle(realm, tier, job).verify(realm.state.certificate, job=job, **options)


def issue(realm: Any, workload: Any, *, lifetime: int = 600) -> Issued:
    request = spiffe.LeafKey.generate().request()
    answer: Issued = realm.ask("certify", realm.signed_by(workload, IssueRequest(request, lifetime)), Issued)
    return answer


def forge(realm: Any, *, tier: str = "simulated", job: str = JOB, **changes: Any) -> bytes:
    """A certificate by the true root, as if the service could be made to say these things."""
    with realm.state.transaction() as database:
        (one, *_) = realm.service.authority._generations(database, tier)
    key, own = one.root(realm.state.name, job)
    facts: dict[str, Any] = {
        "tier": tier, "instance": bytes(32), "evidence": bytes(32), "measurement": "reader", "policy": bytes(32),
        "lineage": "acme", "sequence": 1, "generation": 1,
    }  # fmt: skip
    facts |= {name: value for name, value in changes.items() if name in facts}
    now = realm.clock()
    domain = messages.trust_domain(realm.state.name, tier)
    grant: dict[str, Any] = {
        "uri": spiffe.spiffe_id(domain, job, 0), "dns": None, "common": "x", "facts": write_facts(**facts),
        "not_before": now - 60, "not_after": now + 600,
    }  # fmt: skip
    grant |= {name: value for name, value in changes.items() if name in grant}
    return key.issue(own, spiffe.LeafKey.generate().public, spiffe.Grant(**grant))


def test_what_a_certificate_says(realm: Any) -> None:
    workload = realm.enclave(rank=3)
    credentials = certificates.obtain(workload, lifetime=600)
    assert credentials.spiffe == "spiffe://svc.simulated/job/acme/job/rank/3"
    assert credentials.name == "rank-3.job.acme.svc.simulated"
    assert credentials.expires == realm.clock() + 600
    peer = certificates.verify_peer(workload, credentials, credentials.certificate, rank=3)
    assert (peer.job, peer.rank, peer.generation, peer.tier) == (JOB, 3, 1, "simulated")
    assert peer.instance == workload.result.instance == instance_id(workload.keys.digest)
    assert (peer.evidence, peer.policy) == (workload.result.evidence_digest, workload.result.policy_id)
    assert peer.measurement == "reader"
    leaf = spiffe.read_leaf(credentials.certificate)
    assert leaf.dns == (credentials.name,)
    assert leaf.not_after - leaf.not_before == 660
    (entry,) = realm.entries("certificate")
    assert entry["name"] == credentials.spiffe
    assert entry["certificate"] == x509.fingerprint(leaf.certificate)
    for secret in (credentials.key, b"PRIVATE"):
        assert secret.decode() not in repr(credentials)
    with pytest.raises(UsageError):
        __import__("copy").deepcopy(credentials)


@pytest.mark.threat("SVC-50")
def test_a_certificate_goes_to_the_attested_instance_only(realm: Any) -> None:
    workload, other = realm.enclave(rank=0), realm.enclave(rank=1)
    request = IssueRequest(spiffe.LeafKey.generate().request(), 600)
    size = len(realm.entries("certificate"))
    stolen = realm.signed_by(workload, request, signer=other._signing)
    stranger = realm.signed_by(workload, request, signer=SigningKey.generate())
    tokenless = realm.signed_by(workload, request, token="")
    for attempt, code in ((stolen, "stolen_result"), (stranger, "stolen_result"), (tokenless, "result_malformed")):
        assert realm.code(lambda attempt=attempt: realm.ask("certify", attempt, Issued)) == code
    good = realm.signed_by(workload, request)
    realm.ask("certify", good, Issued)
    assert realm.code(lambda: realm.ask("certify", good, Issued)) == "replayed"
    # A later instance takes rank 0: what the former holds runs out, and there is no next one.
    realm.enclave(rank=0)
    assert realm.code(lambda: issue(realm, workload)) == "slot_retired"
    assert len(realm.entries("certificate")) == size + 1


@pytest.mark.threat("SVC-51")
def test_no_certificate_after_revocation(realm: Any) -> None:
    workload = realm.enclave()
    issue(realm, workload)
    realm.set_policy(references=())
    assert realm.code(lambda: issue(realm, workload)) == "policy_changed"
    realm.clock.now += 300
    assert realm.code(lambda: certificates.obtain(workload)) != ""


@pytest.mark.threat("SVC-51")
@pytest.mark.parametrize(("asked", "max_stale", "given"), [(3540, 3600, 3540), (600, 3600, 600), (3540, 120, 120)])
def test_a_certificate_lives_an_hour_at_most(realm: Any, asked: int, max_stale: int, given: int) -> None:
    realm.set_policy(max_stale=max_stale)
    leaf = spiffe.read_leaf(issue(realm, realm.enclave(), lifetime=asked).certificate)
    assert leaf.not_after - realm.clock() == given
    assert leaf.not_after - leaf.not_before <= messages.MAX_LIFETIME


def test_longer_is_not_asked_for_and_a_policy_may_allow_none(realm: Any) -> None:
    for wrong in (1, 3541, -5):
        with pytest.raises(MalformedError):
            IssueRequest(b"", wrong)
    realm.set_policy(max_stale=1)
    workload = realm.enclave()
    assert realm.code(lambda: issue(realm, workload)) == "certificates_off"


@pytest.mark.threat("SVC-52")
def test_the_request_must_be_by_the_key_it_names(realm: Any) -> None:
    workload, key = realm.enclave(), spiffe.LeafKey.generate()
    request, refused = key.request(), 0
    for position in range(len(request)):
        damaged = bytearray(request)
        damaged[position] ^= 1
        try:
            # One byte, the number of unused bits of the signature, can change without changing what is said.
            assert spiffe.read_request(bytes(damaged)) == key.public
        except MalformedError:
            refused += 1
    assert refused >= len(request) - 1
    for wrong in (b"", request[:-1], request + b"\0", bytes(5000), b"\x30\x80" + bytes(40)):
        signed = realm.signed_by(workload, IssueRequest(wrong, 600))
        assert realm.code(lambda signed=signed: realm.ask("certify", signed, Issued)) == "malformed"


@pytest.mark.threat("SVC-53")
def test_simulated_certificates_are_refused_unless_asked_for(realm: Any) -> None:
    certificate = issue(realm, realm.enclave()).certificate
    roots = bundle(realm)
    with pytest.raises(CertificateRefused, match="simulated"):
        roots.verify(realm.state.certificate, job=JOB, now=realm.clock())
    assert trust(realm).peer(certificate, now=realm.clock()).tier == "simulated"
    # The authority for hardware is another one: its roots do not know this certificate.
    hardware = trust(realm, "hardware", INSECURE_accept_simulated=False)
    with pytest.raises(CertificateRefused, match="none of the roots"):
        hardware.peer(certificate, now=realm.clock())
    assert not set(bundle(realm, "hardware").roots) & set(roots.roots)
    # Even by the true root for hardware, facts of the other tier are refused; relabelling a bundle breaks its seal.
    with pytest.raises(CertificateRefused, match="tier"):
        hardware.peer(_mixed(realm), now=realm.clock())
    with pytest.raises(CertificateRefused, match="not signed"):
        evolve(roots, tier="hardware").verify(realm.state.certificate, job=JOB, now=realm.clock())


def _mixed(realm: Any) -> bytes:
    """By the root for hardware, with facts that say simulated."""
    facts = write_facts(
        tier="simulated", instance=bytes(32), evidence=bytes(32), measurement="m", policy=bytes(32), lineage="acme",
        sequence=1, generation=1,
    )  # fmt: skip
    return forge(realm, tier="hardware", facts=facts)


@pytest.mark.threat("SVC-53")
def test_an_enclave_that_is_not_opened_to_simulation_takes_no_such_roots(realm: Any) -> None:
    workload = realm.enclave()
    workload.configuration = evolve(workload.configuration, INSECURE_accept_simulated=False)
    assert realm.code(lambda: certificates.obtain(workload)) == "certificate_simulated"


@pytest.mark.threat("SVC-54")
def test_another_services_certificates_and_roots_are_refused(realms: Callable[..., Any]) -> None:
    rival = realms()  # same names, another owner
    stranger = issue(rival, rival.enclave()).certificate
    foreign = bundle(rival)
    realm = realms()
    with pytest.raises(CertificateRefused, match="none of the roots"):
        trust(realm).peer(stranger, now=realm.clock())
    with pytest.raises(CertificateRefused, match="not signed"):
        foreign.verify(realm.state.certificate, job=JOB, now=realm.clock(), INSECURE_accept_simulated=True)
    seen = bundle(realm)
    for ahead, good in ((3599, True), (3600, False), (-30, True), (-31, False)):
        options = {"job": JOB, "now": realm.clock() + ahead, "INSECURE_accept_simulated": True}
        if good:
            seen.verify(realm.state.certificate, **options)
        else:
            with pytest.raises(CertificateRefused, match="not of now"):
                seen.verify(realm.state.certificate, **options)
    for changed in ({"roots": foreign.roots}, {"job": "acme/else"}, {"time": realm.clock() + 1}, {"lineage": "b"}):
        with pytest.raises(CertificateRefused):
            evolve(bundle(realm), **changed).verify(
                realm.state.certificate, job=JOB, now=realm.clock(), INSECURE_accept_simulated=True
            )


@pytest.mark.threat("SVC-55")
def test_a_certificate_of_another_job_rank_or_instance_is_refused(realm: Any) -> None:
    here, now = realm.enclave(rank=1), realm.clock()
    mine = issue(realm, here).certificate
    there = issue(realm, realm.enclave("other", job="acme/else", rank=1)).certificate
    # A root for each job: an engine that compares roots only refuses it as well.
    with pytest.raises(CertificateRefused, match="none of the roots"):
        trust(realm).peer(there, now=now)
    assert not set(bundle(realm).roots) & set(bundle(realm, job="acme/else").roots)
    with pytest.raises(CertificateRefused, match="for another job"):
        bundle(realm, job="acme/else").verify(
            realm.state.certificate, job=JOB, now=now, INSECURE_accept_simulated=True
        )
    assert trust(realm).peer(mine, now=now, rank=1, instance=here.result.instance).rank == 1
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rank": 0}, "certificate_name"),
        ({"instance": bytes(32)}, "certificate_instance"),
        ({"least_sequence": 99}, "certificate_policy"),
        ({"now": now + 601}, "certificate_refused"),
        ({"now": now - 61}, "certificate_refused"),
    ]
    for options, code in wrong:
        with pytest.raises(CertificateRefused) as refused:
            trust(realm).peer(mine, **({"now": now} | options))
        assert refused.value.code == code


@pytest.mark.threat("SVC-55")
def test_what_only_a_broken_service_would_issue_is_refused_too(realm: Any) -> None:
    now, seen = realm.clock(), trust(realm)
    assert seen.peer(forge(realm), now=now).measurement == "reader"
    domain = "svc.simulated"
    for changes in (
        {"uri": f"spiffe://{domain}/job/acme/else/rank/0"},
        {"uri": f"spiffe://other/job/{JOB}/rank/0"},
        {"uri": f"spiffe://{domain}/job/{JOB}/rank/00"},
        {"uri": f"spiffe://{domain}/job/a//b/rank/0"},
        {"uri": "https://example.com/"},
        {"not_after": now + 3541},
        {"lineage": "other"},
        {"facts": b""},
        {"facts": cbor.encode({"version": 1})},
        {"instance": bytes(31)},
    ):
        with pytest.raises(CertificateRefused):
            seen.peer(forge(realm, **changes), now=now)


@pytest.mark.threat("SVC-55")
def test_a_certificate_for_another_use_is_refused(realm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, now = trust(realm), realm.clock()
    usage, basic = spiffe.x509.ExtendedKeyUsage, spiffe.x509.BasicConstraints
    changes: list[tuple[str, Any]] = [
        ("ExtendedKeyUsage", lambda uses: usage(uses[:1])),
        ("ExtendedKeyUsage", lambda uses: usage([*uses, spiffe.x509.ObjectIdentifier("2.5.29.37.0")])),
        ("BasicConstraints", lambda **_: basic(ca=True, path_length=0)),
    ]
    for name, change in changes:
        with monkeypatch.context() as broken:
            broken.setattr(spiffe.x509, name, change)
            certificate = forge(realm)
        with pytest.raises(CertificateRefused, match="no workload's"):
            seen.peer(certificate, now=now)


def test_any_damage_is_refused_and_never_another_error(realm: Any) -> None:
    certificate, seen, now = issue(realm, realm.enclave()).certificate, trust(realm), realm.clock()
    for position in range(len(certificate)):
        damaged = bytearray(certificate)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(CertificateRefused):
            seen.peer(bytes(damaged), now=now)
    for wrong in (b"", bytes(100), certificate[:-1], bundle(realm).roots[0], x509.pem(certificate) * 2):
        with pytest.raises(CertificateRefused):
            seen.peer(wrong, now=now)


@pytest.mark.threat("SVC-56")
def test_a_courier_that_swaps_certificates_is_refused(realm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is signed for the request; and even a service that errs is noticed by whom it errs about."""
    workload, other = realm.enclave(rank=0), realm.enclave(rank=1)
    theirs = issue(realm, other)
    for wrong, code in (
        (theirs, "certificate_name"),
        (evolve(theirs, certificate=issue(realm, workload).certificate), "certificate_key"),
        (evolve(theirs, bundle=bundle(realm, "hardware").encode()), "certificate_root"),
        (evolve(theirs, bundle=bundle(realm, job="acme/else").encode()), "certificate_job"),
        (evolve(theirs, bundle=b""), "malformed"),
    ):
        workload.certify = lambda _, wrong=wrong: (wrong, realm.state.certificate)
        assert realm.code(lambda: certificates.obtain(workload)) == code
    key = spiffe.LeafKey.generate()
    with monkeypatch.context() as known:
        known.setattr(spiffe.LeafKey, "generate", lambda: key)
        workload.certify = lambda _: (evolve(theirs, certificate=forge(realm)), realm.state.certificate)
        assert realm.code(lambda: certificates.obtain(workload)) == "certificate_instance"
    captured = realm.serve("certify", realm.signed_by(
        other, IssueRequest(spiffe.LeafKey.generate().request(), 600)).encode())  # fmt: skip
    del workload.certify
    realm.courier = lambda route, body: captured if route == "certify" else realm.serve(route, body)
    assert realm.code(lambda: certificates.obtain(workload)) == "forged_answer"


@pytest.mark.threat("SVC-57")
def test_the_authoritys_secret_lies_sealed_and_its_roots_last(realm: Any) -> None:
    before = bundle(realm).roots
    with realm.state.transaction() as database:
        (one,) = realm.service.authority._generations(database, "simulated")
        kept = bytes(one.secret.expose())
    realm.reopen()
    assert bundle(realm).roots == before
    files = [path for path in (realm.folder / "state").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert kept not in path.read_bytes()
        assert b"PRIVATE KEY" not in path.read_bytes()


@pytest.mark.threat("SVC-57")
def test_a_root_is_published_before_it_is_used_and_followed_in_time(realm: Any) -> None:
    (first,) = bundle(realm).roots
    realm.clock.now += authority.RENEW_AFTER
    workload = realm.enclave()

    def issuer() -> bytes:
        leaf = x509.load(issue(realm, workload).certificate)[0]
        return next(one for one in bundle(realm).roots if x509.issued_by(leaf, x509.load(one)[0]))

    assert issuer() == first
    assert len(bundle(realm).roots) == 2
    second = bundle(realm).roots[1]
    realm.clock.now += authority.PUBLISH
    assert issuer() == second
    assert bundle(realm).roots == [first, second]
    # Under an hour before the first root ends nothing could be issued under it any more: it goes.
    realm.clock.now += authority.ROOT_LIFETIME - authority.RENEW_AFTER - authority.PUBLISH - 3600
    assert bundle(realm).roots == [first, second]
    realm.clock.now += 120
    assert bundle(realm).roots == [second]


def test_after_months_of_rest_there_is_a_root_of_now(realm: Any) -> None:
    bundle(realm)
    realm.clock.now += authority.ROOT_LIFETIME * 2
    (root,) = bundle(realm).roots
    assert x509.valid_at(x509.load(root)[0], realm.clock())
    realm.clock.now -= authority.CLOCK_STEP
    assert bundle(realm).roots == [root]


def test_verified_values_are_not_made_by_hand(realm: Any) -> None:
    seen = trust(realm)
    with pytest.raises(UsageError):
        Trust(bundle(realm), True, None)
    with pytest.raises(UsageError):
        evolve(seen)
    with pytest.raises(UsageError):
        evolve(seen.peer(forge(realm), now=realm.clock()), rank=7)
    with pytest.raises(UsageError):
        WorkloadPeer(
            spiffe="", job="", rank=0, generation=0, instance=b"", evidence=b"", tier="hardware", measurement="",
            policy=b"", sequence=0, public=b"", not_before=0, expires=0, made=None,
        )  # fmt: skip


@pytest.mark.parametrize("job", ["", "a b", "a//b", "/a", "a/", "..", "a/./b", "\u00e4", "a?b", "x" * 3000, "a\nb"])
def test_a_job_that_no_name_spells_has_no_certificate(realm: Any, job: str) -> None:
    with pytest.raises(UsageError):
        spiffe.spiffe_id("acme", job, 0)
    if job and job.isprintable() and len(job) < 100:
        workload = realm.enclave(job=job)
        assert realm.code(lambda: issue(realm, workload)) == "job_unnameable"
    with pytest.raises(IsolateError):
        bundle(realm, job=job)


def test_two_jobs_never_share_a_host_name() -> None:
    jobs = ["a/b", "a.b", "b/a", "a-b", "A/b", "a_b", "b.a", "rank-0/a"]
    names = [spiffe.dns_name("acme", job, 0) for job in jobs]
    real = [one for one in names if one is not None]
    assert len(set(real)) == len(real) == 4
    assert spiffe.dns_name("acme", "/".join(["x" * 60] * 5), 0) is None


def test_a_root_key_depends_on_all_of_its_context() -> None:
    secret = Secret(bytes(32))
    keys = {spiffe.RootKey(secret, *c).public for c in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", 0))}
    assert len(keys) == 4
