"""The numbered list: each check refuses alone, so that removing it would let its attack through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
from attrs import evolve

from isolate.attestation import verifiers
from isolate.attestation.appraisal import CHECKS, Appraisal, Mode, appraise, compare
from isolate.attestation.claims import vouch
from isolate.attestation.evidence import Envelope, Part, Slot, Submod, gpu_nonce
from isolate.attestation.manifest import Manifest
from isolate.attestation.policy import Policy, Reference, Rules, TrustedSigner
from isolate.crypto.signing import SigningKey
from isolate.errors import AppraisalRefused, EvidenceRefused, UsageError
from isolate.launch.root import SimulatedRoot

NOW = 1_780_000_000
NONCE = b"n" * 32
PCRS = {0: b"\x0a" * 48, 1: b"\x0b" * 48, 2: b"\x0c" * 48}
REGISTERS = {f"PCR{index}": one for index, one in PCRS.items()}


def failed(appraisal: Appraisal) -> list[int]:
    return [one.number for one in appraisal.refusals]


@pytest.fixture
def claimed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the kind "fake" verify, with the claims given: for facts that no simulated document states."""
    real = verifiers.find

    def stand(**claims: Any) -> None:
        def verify(evidence: bytes, **_: Any) -> Any:
            return vouch(**({"kind": "fake", "tier": "hardware", "product": "P1"} | claims))

        monkeypatch.setattr(verifiers, "find", lambda kind: verify if kind == "fake" else real(kind))

    return stand


def fake(world: Any, claimed: Any, rules: Rules, policy: dict[str, Any] | None = None, **claims: Any) -> Appraisal:
    """Appraise an envelope of the kind "fake" with these claims under these rules."""
    runtime = world.with_runtime(kind="fake")
    claimed(**({"measurements": REGISTERS, "binding": runtime.binding()} | claims))
    references = (Reference("r", "fake", REGISTERS),)
    judged = Policy(lineage="x", sequence=1, references=references, rules={"fake": rules}).evolve(**(policy or {}))
    return world.appraise(Envelope("fake", b"evidence", (), runtime), policy=judged)


def test_good_evidence_passes_every_check(world: Any) -> None:
    appraisal = world.appraise()
    assert failed(appraisal) == [] and appraisal.accepted and appraisal.reference == "trainer-1"
    assert [one.number for one in appraisal.checks] == list(range(1, 22))
    assert all(one.found for one in appraisal.checks)
    assert world.appraise(world.envelope().encode()).accepted
    appraisal.require()


def test_the_numbers_are_those_of_the_docstring() -> None:
    import isolate.attestation.appraisal as module

    listed = [line.split() for line in (module.__doc__ or "").splitlines()]
    named = {int(words[0][:-1]): words[1] for words in listed if words and words[0][:-1].isdigit()}
    assert len(named) == 21
    assert named == {number: name for number, name, _ in CHECKS}


def test_1_envelope(world: Any) -> None:
    for hostile in (b"", b"\0" * 100, world.envelope().encode()[:-1], world.envelope().encode() + b"\0"):
        appraisal = appraise(hostile, policy=world.policy, nonce=NONCE, at=NOW)
        assert 1 in failed(appraisal) and not appraisal.accepted and appraisal.claims is None
    other = world.with_runtime(profile="isolate/runtime/v2")
    assert failed(world.appraise(world.envelope(runtime=other))) == [1]
    other = world.with_runtime(kind="nitro")
    assert failed(world.appraise(world.envelope(runtime=other))) == [1]


@pytest.mark.threat("ATT-4")
def test_2_simulated_root_under_a_production_policy(world: Any) -> None:
    production = world.policy.evolve(INSECURE_accept_simulated=False)
    appraisal = world.appraise(policy=production)
    assert failed(appraisal) == [2]
    with pytest.raises(AppraisalRefused, match="simulated") as refused:
        appraisal.require()
    assert refused.value.code == "appraisal_simulated"


@pytest.mark.threat("ATT-4")
def test_2_a_simulated_device_beside_hardware(world: Any, claimed: Any) -> None:
    """The tier that the verifier found counts, not the name of the kind."""
    appraisal = fake(world, claimed, Rules(), tier="simulated")
    assert failed(appraisal) == [2]


@pytest.mark.threat("ATT-3")
def test_3_evidence_supplied_root(world: Any) -> None:
    root = SimulatedRoot.generate(clock=lambda: NOW)
    document = root.module("m").document(PCRS, world.runtime.binding(), NONCE)
    appraisal = world.appraise(Envelope("simulated", document, (), world.runtime))
    assert 3 in failed(appraisal) and appraisal.refusals[0].name == "authentic"
    assert "not one that the policy names" in appraisal.refusals[0].found
    assert appraisal.claims is None


def test_3_no_verifier_and_a_failing_verifier(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = world.with_runtime(kind="unheard")
    assert 3 in failed(world.appraise(Envelope("unheard", b"x", (), runtime)))

    def crash(*_: Any, **__: Any) -> Any:
        raise KeyError("attacker's text")

    monkeypatch.setattr(verifiers, "find", lambda kind: crash)
    appraisal = world.appraise(Envelope("unheard", b"x", (), runtime))
    assert appraisal.checks[2].found == "no evidence of this kind is named in the policy"
    named = world.policy.evolve(rules={"unheard": Rules()})
    appraisal = world.appraise(Envelope("unheard", b"x", (), runtime), policy=named)
    assert appraisal.checks[2].found == "the verifier failed"


@pytest.mark.threat("ATT-1")
def test_4_evidence_of_other_keys(world: Any) -> None:
    """Relay: good evidence, shown with a runtime map that names the attacker's keys."""
    theirs = world.with_runtime(keys_digest=b"e" * 32)
    assert failed(world.appraise(Envelope("simulated", world.document(), (), theirs))) == [4]


@pytest.mark.threat("ATT-5")
@pytest.mark.parametrize("change", [lambda b: b + b"\0", lambda b: b[:32], lambda b: b"", lambda b: b[:63] + b"\0"])
def test_4_report_data_padded_or_cut(world: Any, change: Callable[[bytes], bytes]) -> None:
    document = world.document(user_data=change(world.runtime.binding()))
    assert failed(world.appraise(Envelope("simulated", document, (), world.runtime))) == [4]


@pytest.mark.threat("ATT-6")
def test_5_replay_of_evidence_with_an_older_nonce(world: Any) -> None:
    old = world.envelope(runtime=world.with_runtime(nonce=b"o" * 32))
    assert failed(world.appraise(old)) == [5]
    assert failed(world.appraise(nonce=None)) == [5]
    assert failed(world.appraise(nonce=b"")) == [5]
    relaxed = world.policy.evolve(require_nonce=False)
    assert world.appraise(nonce=None, policy=relaxed).accepted


def test_6_the_evidence_s_own_nonce(world: Any) -> None:
    document = world.document(nonce=b"other")
    assert failed(world.appraise(Envelope("simulated", document, (), world.runtime))) == [6]


@pytest.mark.threat("ATT-6")
def test_7_old_or_future_evidence(world: Any) -> None:
    policy = world.policy.evolve(max_age=100)
    for seconds, passes in ((-100, True), (-101, False), (60, True), (61, False)):
        envelope = world.envelope(timestamp_ms=(NOW + seconds) * 1000)
        assert failed(world.appraise(envelope, policy=policy)) == ([] if passes else [7])


def test_8_purpose(world: Any) -> None:
    assert failed(world.appraise(purpose="serve")) == [8]
    assert failed(world.appraise(policy=world.policy.evolve(purposes=("serve",)))) == [8]
    assert world.appraise(purpose=None).accepted


@pytest.mark.threat("ATT-7")
def test_9_a_slot_that_was_not_issued(world: Any) -> None:
    """A twin that claims a rank, or the generation of the instance that it replaces."""
    for slot in (Slot("job", 1, 1), Slot("job", 0, 2), Slot("other", 0, 1), None):
        assert failed(world.appraise(slot=slot)) == [9]
    bare = world.envelope(runtime=world.with_runtime(slot=None))
    assert failed(world.appraise(bare)) == [9] and world.appraise(bare, slot=None).accepted


@pytest.mark.threat("ATT-8")
def test_10_debug_evidence_otherwise_valid(world: Any) -> None:
    envelope = world.envelope(debug=True)
    assert failed(world.appraise(envelope)) == [10]
    allowed = world.policy.evolve(rules={"simulated": Rules(allow_debug=True)})
    assert world.appraise(envelope, policy=allowed).accepted


@pytest.mark.threat("ATT-8")
def test_10_zero_pcrs(world: Any) -> None:
    """A reference of zeros does not admit an enclave in debug mode, whose registers are all zero."""
    zeros = {0: bytes(48), 1: bytes(48), 2: bytes(48)}
    reference = Reference("zero", "simulated", {f"PCR{index}": bytes(48) for index in zeros})
    policy = world.policy.evolve(references=(reference,))
    assert failed(world.appraise(world.envelope(zeros), policy=policy)) == [10]


@pytest.mark.parametrize(
    ("claims", "rules"),
    [
        ({"migration": True}, Rules(allow_migration=True)),
        ({"smt": True}, Rules(allow_smt=True)),
        ({"vmpl": 1}, Rules(vmpls=(0, 1))),
    ],
)
def test_11_configuration(world: Any, claimed: Any, claims: dict[str, Any], rules: Rules) -> None:
    assert failed(fake(world, claimed, Rules(), **claims)) == [11]
    assert fake(world, claimed, rules, **claims).accepted


def test_12_tcb_and_svn(world: Any, claimed: Any) -> None:
    least = Rules(least_svn=2, least_tcb={"P1": {"microcode": 7}})
    assert fake(world, claimed, least, svn=2, tcb={"microcode": 7}).accepted
    for claims in (
        {"svn": 1, "tcb": {"microcode": 7}},
        {"tcb": {"microcode": 7}},
        {"svn": 2, "tcb": {"microcode": 6}},
        {"svn": 2},
        {"svn": 2, "tcb": {"microcode": 7}, "product": "P2"},
    ):
        assert failed(fake(world, claimed, least, **claims)) == [12]


def test_13_status_and_advisories(world: Any, claimed: Any) -> None:
    assert fake(world, claimed, Rules(), status="UpToDate").accepted
    assert failed(fake(world, claimed, Rules(), status="OutOfDate")) == [13]
    assert failed(fake(world, claimed, Rules(), status="UpToDate", advisories=["SA-1"])) == [13]
    assert fake(world, claimed, Rules(advisories=("SA-1",)), status="UpToDate", advisories=["SA-1"]).accepted


def test_14_signers_and_host_data(world: Any, claimed: Any) -> None:
    rules = Rules(signers=(b"a" * 48,), host_data=(b"h" * 32,))
    good: dict[str, Any] = {"signers": {"id_key": b"a" * 48}, "host_data": b"h" * 32}
    assert fake(world, claimed, rules, **good).accepted
    assert failed(fake(world, claimed, rules, **(good | {"signers": {}}))) == [14]
    assert failed(fake(world, claimed, rules, **(good | {"signers": {"id_key": b"b" * 48}}))) == [14]
    assert failed(fake(world, claimed, rules, **(good | {"host_data": b""}))) == [14]


def test_15_platform(world: Any, claimed: Any) -> None:
    rules = Rules(platforms=(b"m1",), denied_products=("P9",))
    assert fake(world, claimed, rules, platform=b"m1").accepted
    assert failed(fake(world, claimed, rules, platform=b"m2")) == [15]
    assert failed(fake(world, claimed, rules, platform=b"m1", product="P9")) == [15]


@pytest.mark.threat("ATT-9")
def test_16_one_changed_line_is_another_measurement(world: Any) -> None:
    appraisal = world.appraise(world.envelope({**PCRS, 0: b"\x0e" * 48, 2: b"\x0d" * 48}))
    assert failed(appraisal) == [16]
    check = appraisal.refusals[0]
    assert check.expected.startswith("trainer-1: PCR0 0a0a0a0a0a0a0a0a") and "PCR2 0c0c" in check.expected
    assert "PCR0 0e0e0e0e" in check.found and "PCR2 0d0d0d0d" in check.found and "PCR1" not in check.found
    with pytest.raises(AppraisalRefused) as refused:
        appraisal.require()
    assert refused.value.code == "appraisal_measurement" and "PCR2" in str(refused.value)


@pytest.mark.threat("ATT-9")
def test_16_an_empty_reference_set_denies(world: Any) -> None:
    assert failed(world.appraise(policy=world.policy.evolve(references=()))) == [16]
    of_another_kind = (Reference("r", "nitro", REGISTERS),)
    assert failed(world.appraise(policy=world.policy.evolve(references=of_another_kind))) == [16]


def test_16_only_the_registers_of_a_reference_are_compared(world: Any) -> None:
    loose = (Reference("application only", "simulated", {"PCR2": PCRS[2]}),)
    assert world.appraise(
        world.envelope({**PCRS, 1: b"\7" * 48}), policy=world.policy.evolve(references=loose)
    ).accepted


@pytest.mark.threat("ATT-9")
def test_16_no_rule_admits_unmeasured_code(world: Any) -> None:
    """any_measurement is for devices: the CPU's evidence is compared whatever the rules say."""
    rules = {"simulated": Rules(any_measurement=True)}
    assert failed(world.appraise(policy=world.policy.evolve(references=(), rules=rules))) == [16]


def test_17_validity_lets_two_versions_overlap(world: Any) -> None:
    old = Reference("v1", "simulated", REGISTERS, not_after=NOW + 10)
    new = Reference("v2", "simulated", {**REGISTERS, "PCR2": b"\7" * 48}, not_before=NOW - 10)
    policy = world.policy.evolve(references=(old, new), max_age=10_000, max_skew=10_000)
    upgraded = world.envelope({**PCRS, 2: b"\7" * 48})
    assert world.appraise(policy=policy).accepted and world.appraise(upgraded, policy=policy).accepted
    assert failed(world.appraise(policy=policy, at=NOW + 10)) == [17]
    assert failed(world.appraise(upgraded, policy=policy, at=NOW - 11)) == [17]


@pytest.mark.threat("ATT-10")
def test_18_a_revoked_measurement_is_denied_whatever_else_admits_it(world: Any) -> None:
    good, revoked = (
        Reference("again", "simulated", REGISTERS),
        Reference("v1", "simulated", REGISTERS, revoked_at=NOW),
    )
    policy = world.policy.evolve(references=(good, revoked))
    assert failed(world.appraise(policy=policy)) == [18]
    assert world.appraise(policy=policy, at=NOW - 1).accepted


def gpu(world: Any, claimed: Any, binding: bytes | None = None, **policy: Any) -> tuple[Envelope, Policy]:
    """A simulated CPU with a "fake" GPU beside it."""
    runtime = world.with_runtime(submods=(Submod.of("fake", b"gpu evidence"),))
    bound = gpu_nonce(runtime.nonce, runtime.keys_digest) if binding is None else binding
    claimed(measurements={"M01": b"\1" * 48}, binding=bound)
    envelope = evolve(world.envelope(runtime=runtime), parts=(Part("fake", b"gpu evidence"),))
    rules = {"fake": Rules(any_measurement=True)}
    return envelope, world.policy.evolve(rules=rules, require_submods=("fake",), **policy)


def test_19_submods(world: Any, claimed: Any) -> None:
    envelope, policy = gpu(world, claimed)
    assert world.appraise(envelope, policy=policy).accepted
    assert failed(world.appraise(evolve(envelope, parts=()), policy=policy)) == [19]
    assert failed(world.appraise(world.envelope(), policy=policy)) == [19]
    other = evolve(envelope, parts=(Part("fake", b"another report"),))
    assert failed(world.appraise(other, policy=policy)) == [19]


def test_20_submods_authentic(world: Any) -> None:
    runtime = world.with_runtime(submods=(Submod.of("nvidia-gpu", b"no report"),))
    envelope = evolve(world.envelope(runtime=runtime), parts=(Part("nvidia-gpu", b"no report"),))
    appraisal = world.appraise(envelope)
    assert 20 in failed(appraisal) and 3 not in failed(appraisal) and not appraisal.accepted


@pytest.mark.threat("ATT-11")
def test_21_a_good_gpu_of_another_session_cannot_be_mixed_in(world: Any, claimed: Any) -> None:
    for binding in (gpu_nonce(b"o" * 32, world.runtime.keys_digest), gpu_nonce(NONCE, b"e" * 32), NONCE, b""):
        envelope, policy = gpu(world, claimed, binding)
        assert failed(world.appraise(envelope, policy=policy)) == [21]


def test_a_device_without_a_reference_needs_an_explicit_rule(world: Any, claimed: Any) -> None:
    envelope, policy = gpu(world, claimed)
    assert failed(world.appraise(envelope, policy=policy.evolve(rules={"fake": Rules()}))) == [16]


def test_replay_reads_a_record_and_gives_no_freshness(world: Any) -> None:
    old = world.envelope(timestamp_ms=(NOW - 250) * 1000)
    at = NOW - 250
    assert failed(world.appraise(old, at=at, nonce=None)) == [5]
    assert verifiers.own_time("simulated", old.evidence) == at
    assert world.appraise(old, at=at, nonce=None, mode=Mode.REPLAY).accepted
    assert failed(world.appraise(old, at=at + 1, nonce=None, mode=Mode.REPLAY)) == [7]
    with pytest.raises(UsageError):
        verifiers.own_time("tdx", b"")
    for junk in (b"", b"junk", b"\x01", b"\x83\x01\x02\x03"):
        for kind in verifiers.TIMED:
            with pytest.raises(EvidenceRefused):
                verifiers.own_time(kind, junk)


def test_manifests_ship_new_code_without_a_new_policy(world: Any) -> None:
    key, stranger = SigningKey.generate(), SigningKey.generate()
    signer = TrustedSigner("trainer", str(key.verifying_key), least_version=2)
    policy = world.policy.evolve(references=(), trusted_signers=(signer,))
    manifest = Manifest("trainer", 2, "simulated", REGISTERS)
    accepted = world.appraise(policy=policy, manifests=[b"noise", manifest.sign(key)])
    assert accepted.accepted and accepted.reference == "trainer 2"
    for other in (
        manifest.sign(stranger),
        evolve(manifest, version=1).sign(key),
        evolve(manifest, product="other").sign(key),
        manifest.sign(key)[:-1] + bytes([manifest.sign(key)[-1] ^ 1]),
    ):
        assert failed(world.appraise(policy=policy, manifests=[other])) == [16]
    old = evolve(manifest, not_after=NOW).sign(key)
    assert failed(world.appraise(policy=policy, manifests=[old])) == [17]


def test_an_appraisal_is_made_by_appraise_only(world: Any) -> None:
    appraisal = world.appraise()
    with pytest.raises(UsageError):
        attrs.evolve(appraisal, checks=())
    with pytest.raises(UsageError):
        Appraisal()


def test_evidence_alone_is_compared_without_a_runtime_map(world: Any) -> None:
    claims, checks = compare(Part("simulated", world.document()), policy=world.policy, at=NOW)
    assert claims is not None and all(one.passed for one in checks)
    assert [one.number for one in checks] == [2, 3, 7, *range(10, 19)]
    claims, checks = compare(Part("simulated", b"junk"), policy=world.policy, at=NOW)
    assert claims is None and not checks[1].passed
