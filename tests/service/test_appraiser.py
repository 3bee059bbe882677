"""Challenge and attest: the six numbered checks of service/appraiser.py, each alone, and the attacks on them."""

from __future__ import annotations

from typing import Any

import pytest

from isolate.attestation.evidence import Slot
from isolate.crypto.signing import SigningKey
from isolate.errors import AppraisalRefused, MalformedError
from isolate.launch.root import SimulatedRoot
from isolate.messages.attest import AttestRequest
from isolate.service import appraiser

LIFETIME = appraiser.NONCE_LIFETIME


def test_an_enclave_attests_and_the_log_says_so(realm: Any) -> None:
    before = len(realm.entries())
    token = realm.attest(realm.evidence(realm.challenge()))
    assert token.count(".") == 2
    (entry,) = realm.entries()[before:]
    assert (entry["kind"], entry["measurement"], entry["slot"]["rank"]) == ("attestation", "reader", 0)


@pytest.mark.threat("SVC-1")
def test_check_1_a_nonce_that_was_never_issued(realm: Any) -> None:
    challenge = realm.challenge()
    for nonce in (bytes(32), challenge.nonce[:-1] + bytes([challenge.nonce[-1] ^ 1]), b"", challenge.nonce[:31]):
        request = realm.evidence(challenge, nonce=nonce)
        assert realm.code(lambda request=request: realm.attest(request)) == "nonce_refused"


@pytest.mark.threat("SVC-1")
@pytest.mark.parametrize("slot", [Slot("acme/job", 1, 1), Slot("acme/job", 0, 2), Slot("other", 0, 1), None])
def test_check_1_a_nonce_that_was_issued_for_another_slot(realm: Any, slot: Slot | None) -> None:
    request = realm.evidence(realm.challenge(), slot=slot)
    assert realm.code(lambda: realm.attest(request)) == "nonce_refused"


@pytest.mark.threat("SVC-1")
def test_check_1_replay_after_expiry(realm: Any) -> None:
    challenges = realm.challenge(), realm.challenge(rank=1)
    realm.clock.now += LIFETIME - 1
    late, later = map(realm.evidence, challenges)
    realm.attest(late)
    realm.clock.now += 1
    assert realm.code(lambda: realm.attest(later)) == "nonce_refused"


@pytest.mark.threat("SVC-1")
def test_check_1_replay_after_a_restart_of_the_service(realm: Any) -> None:
    used, unused = realm.evidence(realm.challenge()), realm.evidence(realm.challenge(rank=1))
    realm.attest(used)
    realm.reopen()
    assert realm.code(lambda: realm.attest(used)) == "nonce_refused"
    assert realm.code(lambda: realm.attest(unused)) == "nonce_refused"


@pytest.mark.threat("SVC-2")
def test_check_1_strangers_fill_no_table_and_burn_no_nonce(realm: Any) -> None:
    rows = realm.rows()
    challenge = realm.challenge()
    for rank in range(200):
        realm.challenge(rank, job=f"job {rank}")
    # Whoever saw the nonce sends rubbish with it, first.
    rubbish = realm.evidence(challenge, root=SimulatedRoot.generate(clock=realm.clock))
    for _ in range(3):
        assert realm.code(lambda: realm.attest(rubbish)) == "appraisal_authentic"
    assert realm.rows() == rows
    realm.attest(realm.evidence(challenge))


@pytest.mark.threat("SVC-3")
def test_check_2_other_keys_than_the_evidence_names(realm: Any) -> None:
    request = realm.evidence(realm.challenge())
    others = [
        realm.keys(),
        {**request.keys, "sign": SigningKey.generate().verifying_key.to_bytes()},
        {**request.keys, "channel": b"short"},
        {name: key for name, key in request.keys.items() if name != "sign"},
        {**request.keys, "more": bytes(32)},
        {},
    ]
    for keys in others:
        changed = AttestRequest(request.envelope, keys)
        assert realm.code(lambda changed=changed: realm.attest(changed)) == "keys_mismatch"
    realm.attest(request)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"measurement": "unknown"}, "appraisal_measurement"),
        ({"root": "another"}, "appraisal_authentic"),
        ({"kind": "nitro"}, "appraisal_envelope"),
    ],
)
@pytest.mark.threat("SVC-4")
def test_check_3_what_the_policy_does_not_admit(realm: Any, how: dict[str, Any], code: str) -> None:
    if "root" in how:
        how = {"root": SimulatedRoot.generate(clock=realm.clock)}
    request = realm.evidence(realm.challenge(), **how)
    assert realm.code(lambda: realm.attest(request)) == code


@pytest.mark.threat("SVC-4")
def test_check_3_simulated_evidence_under_a_production_policy(realm: Any) -> None:
    realm.set_policy(INSECURE_accept_simulated=False)
    assert realm.code(lambda: realm.attest(realm.evidence(realm.challenge()))) == "appraisal_simulated"


def test_check_3_without_a_policy_nobody_is_admitted(realm: Any) -> None:
    with realm.state.transaction() as database:
        database.execute("DELETE FROM policy")
    assert realm.code(lambda: realm.attest(realm.evidence(realm.challenge()))) == "no_policy"


@pytest.mark.threat("SVC-4")
def test_check_4_a_policy_that_changes_during_the_appraisal(realm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request, real = realm.evidence(realm.challenge()), appraiser.appraise

    def slow(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        realm.set_policy(references=())
        return found

    monkeypatch.setattr(appraiser, "appraise", slow)
    assert realm.code(lambda: realm.attest(request)) == "policy_changed"
    assert not realm.entries("attestation")


@pytest.mark.threat("SVC-1")
def test_check_5_replay_after_use(realm: Any) -> None:
    request = realm.evidence(realm.challenge())
    realm.attest(request)
    assert realm.code(lambda: realm.attest(request)) == "nonce_refused"


@pytest.mark.threat("SVC-5")
def test_check_5_a_slot_taken_twice(realm: Any) -> None:
    one, two = realm.evidence(realm.challenge()), realm.evidence(realm.challenge())
    realm.attest(one)
    assert realm.code(lambda: realm.attest(two)) == "slot_taken"


@pytest.mark.threat("SVC-5")
def test_check_6_a_retired_instance_never_comes_back(realm: Any) -> None:
    """Two twins of one measurement: the later one has the rank, and they do not take turns."""
    keys, twin = realm.keys(), realm.keys()
    realm.attest(realm.evidence(realm.challenge(), keys=keys))
    realm.attest(realm.evidence(realm.challenge(), keys=keys))  # a renewal
    realm.attest(realm.evidence(realm.challenge(), keys=twin))
    for rank in (0, 1):
        again = realm.evidence(realm.challenge(rank), keys=keys)
        assert realm.code(lambda again=again: realm.attest(again)) == "slot_retired"
    realm.attest(realm.evidence(realm.challenge(), keys=twin))


def test_a_slot_that_no_job_has(realm: Any) -> None:
    for rank, job in ((-1, "job"), (2**32, "job"), (0, ""), (0, "a\nb"), (0, "j" * 129)):
        with pytest.raises(MalformedError):
            realm.challenge(rank, job)


@pytest.mark.threat("SVC-6")
def test_refusals_grow_the_log_with_their_logarithm_only(realm: Any) -> None:
    stranger = SimulatedRoot.generate(clock=realm.clock)
    for _ in range(20):
        for root in (stranger, realm.root):
            request = realm.evidence(realm.challenge(), root=root, measurement="unknown")
            assert realm.code(lambda request=request: realm.attest(request)).startswith("appraisal_")
    found = realm.entries("attestation refused")
    assert [(one["count"], one["code"]) for one in found] == [(n, "measurement") for n in (1, 2, 4, 8, 16)]


@pytest.mark.threat("SVC-7")
def test_a_failing_commit_gives_no_result(realm: Any) -> None:
    request = realm.evidence(realm.challenge())
    realm.fail("COMMIT")
    assert realm.code(lambda: realm.attest(request)) == "storage"


def test_a_policy_of_a_lower_sequence_another_lineage_or_another_owner(realm: Any) -> None:
    from isolate.attestation.policy import SignedPolicy
    from isolate.messages.owner import PolicyUpdate

    def offer(policy: Any, key: SigningKey) -> str:
        update = PolicyUpdate(SignedPolicy.sign(policy, key).encode())
        return str(realm.code(lambda: realm.tell("policy", update)))

    first = realm.policy()
    assert offer(first, SigningKey.generate()) == "policy_signature"
    assert offer(first.evolve(lineage="another"), realm.owner) == "policy_lineage"
    assert offer(first, realm.owner) == ""
    assert offer(first, realm.owner) == "policy_rollback"
    assert offer(first.evolve(sequence=1), realm.owner) == "policy_rollback"


def test_evidence_is_shown_to_the_owner(realm: Any) -> None:
    from isolate.messages.owner import Evidence, EvidenceRequest

    enclave = realm.enclave()
    found = realm.tell("evidence", EvidenceRequest(enclave.result.instance), Evidence)
    assert found.envelope
    assert realm.code(lambda: realm.tell("evidence", EvidenceRequest(bytes(32)), Evidence)) == "usage"
    with pytest.raises(AppraisalRefused):
        realm.enclave("unknown")
