"""What an enclave believes: only the service that its owner certified, and only an answer to its own question."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from isolate import sealed
from isolate.crypto import cbor
from isolate.crypto.signing import SigningKey
from isolate.enclave import boot, workload
from isolate.errors import ControlMissing, ServiceUnavailable, Tampered, UsageError
from isolate.messages.attest import AttestAnswer, Challenge, ChallengeRequest, Release
from isolate.messages.base import Answer, Signed
from isolate.service.broker import Broker


@pytest.fixture(autouse=True)
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one enclave here was released leaves no trace in the next test."""
    monkeypatch.setattr(boot, "_quiet", False)


@pytest.mark.threat("ENC-1")
def test_a_service_that_the_owner_did_not_certify(realm: Any) -> None:
    stranger = SigningKey.generate().verifying_key
    assert realm.code(lambda: realm.enclave(owner=stranger)) == "service_uncertified"
    assert realm.code(lambda: realm.enclave(lineage="another")) == "service_uncertified"
    assert realm.code(lambda: realm.enclave(INSECURE_accept_simulated=False)) == "result_simulated"


@pytest.mark.threat("ENC-1")
def test_a_second_service_with_keys_of_its_own(realms: Callable[..., Any]) -> None:
    """The courier leads the enclave to another service, which would sign anything."""
    good = realms()
    bad = realms()
    assert good.code(lambda: bad.enclave(owner=good.owner.verifying_key)) == "service_uncertified"
    # With the good certificate in front of it.
    genuine = good.state.certificate.encode()

    def lie(route: str, body: bytes) -> tuple[int, bytes]:
        status, answer = bad.serve(route, body)
        if route == "challenge":
            answer = evolve(Challenge.parse(answer), certificate=genuine).encode()
        return status, answer

    bad.courier = lie
    assert good.code(lambda: bad.enclave(owner=good.owner.verifying_key)) == "service_uncertified"


@pytest.mark.threat("ENC-1")
def test_an_expired_certificate(realm: Any) -> None:
    realm.clock.now = realm.state.certificate.not_after
    assert realm.code(realm.enclave) == "service_expired"


@pytest.mark.threat("ENC-5")
def test_an_old_challenge_sets_the_clock_back(realm: Any) -> None:
    """The host keeps an answer, and shows it again later: time would stand still, and nothing expire."""
    old = realm.serve("challenge", ChallengeRequest(b"o" * 32, "acme/job", 0).encode())
    realm.courier = lambda route, body: old if route == "challenge" else realm.serve(route, body)
    assert realm.code(realm.enclave) == "challenge_mismatch"


@pytest.mark.threat("ENC-5")
def test_time_is_the_services_and_what_has_passed_since(realm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [1000.0]
    monkeypatch.setattr(workload, "_elapsed", lambda: passed[0])
    enclave = realm.enclave()
    assert enclave.now() == realm.clock()
    passed[0] += 77.9
    assert enclave.now() == realm.clock() + 77


@pytest.mark.threat("ENC-6")
def test_another_instances_result(realm: Any) -> None:
    other = realm.attest(realm.evidence(realm.challenge(1)))

    def swap(route: str, body: bytes) -> tuple[int, bytes]:
        return (200, AttestAnswer(other).encode()) if route == "attest" else realm.serve(route, body)

    realm.courier = swap
    assert realm.code(realm.enclave) == "result_refused"


@pytest.mark.threat("ENC-6")
def test_an_old_result_is_no_renewal(realm: Any) -> None:
    enclave = realm.enclave()
    old = enclave.token()
    realm.courier = lambda route, body: (
        (200, AttestAnswer(old).encode()) if route == "attest" else realm.serve(route, body)
    )
    realm.clock.now += 250
    assert realm.code(enclave.token) == "result_refused"


def test_a_result_is_renewed_near_its_end(realm: Any) -> None:
    path, enclave = realm.asset(), realm.enclave()
    first = enclave.token()
    realm.clock.now += 200
    assert enclave.token() == first
    realm.clock.now += 50
    assert enclave.token() != first
    assert enclave.slot.generation == 2
    for _ in range(5):
        realm.clock.now += 250
        sealed.load_file(path, identity=enclave)
    assert realm.rows()["slot"] == 1
    assert realm.rows()["instance"] == 1


def test_while_the_service_is_down_a_result_is_good_to_its_end_and_no_longer(realm: Any) -> None:
    enclave = realm.enclave()
    first = enclave.token()

    def down(*_: Any) -> Any:
        raise ServiceUnavailable("no")

    realm.courier = down
    realm.clock.now += 250
    assert enclave.token() == first
    tried = len(realm.carried)
    assert enclave.token() == first
    assert len(realm.carried) == tried  # not at every call
    realm.clock.now = enclave.result.expires
    with pytest.raises(ServiceUnavailable):
        enclave.token()
    realm.clock.now += 10
    realm.courier = realm.serve
    assert enclave.token() != first


def test_a_renewal_is_seen_whole_by_other_threads(realm: Any, request: pytest.FixtureRequest) -> None:
    enclave = realm.enclave()
    # Threads that do nothing but look take turns often: more is seen between, and nobody waits for them.
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)
    stop, odd = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            # The clock may move while it looks.
            standing, before, now, after = enclave._standing, realm.clock(), enclave.now(), realm.clock()
            if standing.result.slot != standing.slot or not before <= now <= after:
                odd.append(standing)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        realm.clock.now += 250
        enclave.token()
    stop.set()
    for thread in threads:
        thread.join(5)
    assert odd == []


@pytest.mark.threat("ENC-2")
def test_a_release_for_another_request(realm: Any) -> None:
    path = realm.asset()
    enclave, facts = realm.enclave(), sealed.public_facts(path)
    enclave.unlock(facts)
    old = realm.serve(*[one for one in realm.carried if one[0] == "release"][-1])
    assert old[0] == 403  # replayed
    kept: list[tuple[int, bytes]] = []

    def keep(route: str, body: bytes) -> tuple[int, bytes]:
        kept.append(realm.serve(route, body))
        return kept[0]

    realm.courier = keep
    enclave.unlock(facts)
    assert realm.code(lambda: enclave.unlock(facts)) == "forged_answer"


@pytest.mark.threat("ENC-2")
def test_answers_that_a_courier_swaps_between_enclaves(realm: Any) -> None:
    path = realm.asset()
    facts = sealed.public_facts(path)
    enclaves = [realm.enclave(rank=rank) for rank in (0, 1)]
    answers: dict[int, tuple[int, bytes]] = {}
    waiting = threading.Barrier(2, timeout=10)

    def swap(route: str, body: bytes) -> tuple[int, bytes]:
        mine = 0 if Signed.parse(body).key == enclaves[0]._signing.verifying_key.to_bytes() else 1
        answers[mine] = realm.serve(route, body)
        waiting.wait()
        return answers[1 - mine]

    realm.courier = swap
    codes: list[str] = []
    threads = [
        threading.Thread(target=lambda one=one: codes.append(realm.code(lambda: one.unlock(facts))))  # type: ignore[misc]
        for one in enclaves
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert codes == ["forged_answer", "forged_answer"]


@pytest.mark.threat("ENC-2")
@pytest.mark.parametrize(
    "changes",
    [
        {"asset": "other"}, {"epoch": 2}, {"policy": bytes(32)}, {"compartments": ["*"]}, {"instance": bytes(32)},
        {"digest": bytes(32)}, {"nonce": bytes(32)}, {"compartments": ["*", "main", "more"]},
    ],
)  # fmt: skip
def test_a_release_whose_context_does_not_fit(
    realm: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed by the good service, for this request; but it says something else than the file does."""
    path, real = realm.asset(), Broker._open

    def wrong(*arguments: Any) -> Any:
        context, keys, hpke = real(*arguments)
        return evolve(context, **changes), keys, hpke

    monkeypatch.setattr(Broker, "_open", wrong)
    assert realm.code(lambda: sealed.load_file(path, identity=realm.enclave())) == "release_mismatch"


@pytest.mark.threat("ENC-2")
@pytest.mark.parametrize("keys", [{"main": b"short"}, {}, {"*": bytes(32), "main": 5}, [1], {"none": bytes(32)}])
def test_a_release_that_holds_no_keys(realm: Any, keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = realm.asset(), Release.make
    monkeypatch.setattr(Release, "make", lambda context, _, hpke, key: real(context, keys, hpke, key))
    assert realm.code(lambda: sealed.load_file(path, identity=realm.enclave())) == "release_mismatch"


@pytest.mark.threat("ENC-2")
def test_a_box_for_another_context(realm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The context is HPKE's info: a box does not open under a changed one, whoever signed that."""
    path, real = realm.asset(), Release.make

    def make(context: Any, keys: Any, hpke: Any, key: SigningKey) -> Release:
        moved = real(evolve(context, log_index=context.log_index + 1), keys, hpke, key)
        good = real(context, keys, hpke, key)
        from isolate.crypto.signing import Purpose

        signed = cbor.encode(["release", good.context, moved.box])
        return Release(good.context, moved.box, key.sign(Purpose.RELEASE, signed))

    monkeypatch.setattr(Release, "make", make)
    assert realm.code(lambda: sealed.load_file(path, identity=realm.enclave())) == "no_recipient"


@pytest.mark.threat("ENC-7")
def test_what_is_made_is_sealed_to_the_certified_recipients(
    realm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISOLATE_ASSETS", str(tmp_path))
    realm.rule("made/here", readers=("reader",), writers=("writer",))
    enclave = realm.enclave("writer")
    registered = enclave.seal("made/here", {"w": np.ones(3, np.float32)}, epoch=1)
    path = enclave.locate("made/here")
    facts = sealed.public_facts(path)
    assert (registered.digest, len(facts.slot.stanzas)) == (facts.digest, 2)
    sealed.load_file(path, identity=realm.recovery, expect=registered.digest)
    sealed.load_file(path, identity=realm.enclave("reader", rank=1))


@pytest.mark.threat("ENC-7")
def test_a_file_that_the_host_swaps_while_it_is_registered(
    realm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISOLATE_ASSETS", str(tmp_path))
    realm.rule("made/here", writers=("writer",))
    enclave, real = realm.enclave("writer"), sealed.public_facts
    enclave.seal("made/here", {"w": np.ones(3, np.float32)}, epoch=1)
    kept = enclave.locate("made/here").read_bytes()

    def swapped(path: Path) -> Any:
        path.write_bytes(kept)
        return real(path)

    monkeypatch.setattr(sealed, "public_facts", swapped)
    with pytest.raises(Tampered):
        enclave.seal("made/here", {"w": np.zeros(3, np.float32)}, epoch=2)


@pytest.mark.threat("ENC-7")
def test_a_registration_that_nobody_took(realm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOLATE_ASSETS", str(tmp_path))
    enclave = realm.enclave("writer")
    key = SigningKey.generate()

    def lie(_: str, body: bytes) -> tuple[int, bytes]:
        from isolate.messages.attest import Registered

        return 200, Answer.make(Signed.parse(body), Registered("a", bytes(32), 1, 1), key).encode()

    realm.courier = lie
    assert realm.code(lambda: enclave.seal("a", {"w": np.ones(3)}, epoch=1)) == "forged_answer"


@pytest.mark.threat("ENC-8")
def test_a_workload_shows_no_secret(realm: Any) -> None:
    enclave = realm.enclave()
    for copies in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UsageError):
            copies(enclave)
    shown = repr(enclave) + str(enclave) + str(vars(enclave)) + repr(enclave.attested())
    for secret in (enclave._channel_key, enclave._identity._seed, enclave._signing._seed):
        raw = bytes(secret.expose())
        assert raw.hex() not in shown
        assert repr(raw)[2:-1] not in shown
    key = enclave._channel_key
    with pytest.raises(OSError, match="x"), enclave:
        raise OSError("x")
    with pytest.raises(UsageError):
        key.expose()


def test_joining_outside_an_enclave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ISOLATE_APPLICATION", raising=False)
    with pytest.raises(ControlMissing):
        workload.join()
    monkeypatch.setenv("ISOLATE_APPLICATION", str(tmp_path))
    with pytest.raises(UsageError):
        workload.join()
    key = SigningKey.generate().verifying_key
    (tmp_path / "isolate.toml").write_text(
        f'[owner]\nroot = "{key}"\nlineage = "l"\n[enclave]\npurpose = "p"\njob = "j"\n'
    )
    for name, value in (("ISOLATE_RANK", "one"), ("ISOLATE_ATTEST_FD", "x"), ("ISOLATE_SERVICE", "")):
        monkeypatch.setenv("ISOLATE_RANK", "0")
        monkeypatch.setenv("ISOLATE_SERVICE", "unix:/nowhere")
        monkeypatch.setenv("ISOLATE_ATTEST_FD", "999999")
        with pytest.raises(ControlMissing):
            workload.join()
        monkeypatch.setenv(name, value)
        with pytest.raises(UsageError):
            workload.join()
    with pytest.raises(UsageError):
        workload.join(job="another")
