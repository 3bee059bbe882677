"""Key release: the eight numbered checks of service/broker.py, each alone, and the attacks on them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from isolate import sealed
from isolate.attestation.policy import Reference
from isolate.crypto.signing import Purpose, SigningKey
from isolate.messages.attest import Registered, RegisterRequest, Release, ReleaseRequest
from isolate.service.broker import Broker


@pytest.fixture
def path(realm: Any) -> Any:
    return realm.asset()


@pytest.fixture
def wanted(path: Any) -> ReleaseRequest:
    return ReleaseRequest(sealed.public_facts(path).digest, [], b"n" * 32)


def test_what_is_released_opens_the_file_and_stands_in_the_log(realm: Any, path: Any) -> None:
    enclave = realm.enclave()
    assert sealed.load_file(path, identity=enclave)["w"].tolist() == [1, 2, 3, 4]
    (entry,) = realm.entries("release")
    assert entry["asset"] == "a/b"
    assert entry["instance"] == enclave.result.instance
    assert entry["measurement"] == "reader"
    assert entry["compartments"] == ["*", *sealed.public_facts(path).compartments]


@pytest.mark.threat("SVC-8")
def test_check_1_a_request_for_another_service_or_changed_on_its_way(realm: Any, wanted: ReleaseRequest) -> None:
    enclave = realm.enclave()

    def refused(signed: Any) -> str:
        return str(realm.code(lambda: realm.ask("release", signed, Release)))

    assert refused(realm.signed_by(enclave, wanted, audience="another")) == "wrong_audience"
    signed = realm.signed_by(enclave, wanted)
    assert refused(evolve(signed, nonce=bytes(32))) == "bad_signature"
    assert refused(evolve(signed, body=evolve(wanted, nonce=b"m" * 32).encode())) == "bad_signature"
    assert refused(evolve(signed, token=signed.token[:-1])) == "bad_signature"
    assert refused(realm.signed_by(enclave, wanted, purpose=Purpose.HOLDER_REQUEST)) == "bad_signature"


@pytest.mark.threat("SVC-9")
def test_check_2_a_result_of_a_second_service_with_keys_of_its_own(realms: Callable[..., Any]) -> None:
    good = realms()
    wanted = ReleaseRequest(sealed.public_facts(good.asset()).digest, [], b"n" * 32)
    bad = realms()  # answers from now on, and admits whomever it likes
    signed = bad.signed_by(bad.enclave(), wanted)
    bad.courier = good.serve
    assert good.code(lambda: good.ask("release", signed, Release)) == "result_signature"


@pytest.mark.threat("SVC-9")
def test_check_2_an_expired_result(realm: Any, wanted: ReleaseRequest) -> None:
    enclave = realm.enclave()
    signed = realm.signed_by(enclave, wanted)
    realm.clock.now = enclave.result.expires
    assert realm.code(lambda: realm.ask("release", signed, Release)) == "result_expired"


@pytest.mark.threat("SVC-9")
def test_check_2_a_result_under_an_earlier_policy(realm: Any, wanted: ReleaseRequest) -> None:
    signed = realm.signed_by(realm.enclave(), wanted)
    realm.set_policy()
    assert realm.code(lambda: realm.ask("release", signed, Release)) == "policy_changed"


@pytest.mark.threat("SVC-9")
def test_check_2_a_simulated_result_under_a_production_policy(realm: Any, wanted: ReleaseRequest) -> None:
    signed = realm.signed_by(realm.enclave(), wanted)
    realm.set_policy(INSECURE_accept_simulated=False)
    assert realm.code(lambda: realm.ask("release", signed, Release)) == "result_simulated"


@pytest.mark.threat("SVC-10")
def test_check_3_a_stolen_result(realm: Any, wanted: ReleaseRequest) -> None:
    victim, thief = realm.enclave(), SigningKey.generate()
    signed = realm.signed_by(victim, wanted, signer=thief)
    assert realm.code(lambda: realm.ask("release", signed, Release)) == "stolen_result"


@pytest.mark.threat("SVC-10")
def test_check_3_another_instances_result(realm: Any, wanted: ReleaseRequest) -> None:
    """Two enclaves that are both admitted: neither speaks with the other's result."""
    one, other = realm.enclave(rank=0), realm.enclave("other", rank=1)
    signed = realm.signed_by(other, wanted, token=one.token())
    assert realm.code(lambda: realm.ask("release", signed, Release)) == "stolen_result"


@pytest.mark.threat("SVC-5")
def test_check_4_a_retired_generation(realm: Any, wanted: ReleaseRequest) -> None:
    old = realm.enclave()
    signed = realm.signed_by(old, wanted)
    realm.enclave()  # the restart
    assert realm.code(lambda: realm.ask("release", signed, Release)) == "slot_retired"


def test_check_4_a_renewal_overtakes_no_request_on_its_way(realm: Any, wanted: ReleaseRequest) -> None:
    enclave = realm.enclave()
    signed = realm.signed_by(enclave, wanted)
    realm.clock.now += 250
    assert enclave.token() != signed.token
    realm.ask("release", signed, Release)


@pytest.mark.threat("SVC-11")
def test_check_5_a_measurement_that_is_revoked_meanwhile(realm: Any, wanted: ReleaseRequest) -> None:
    pcrs = {f"PCR{i}": one for i, one in enumerate(realm_registers("reader"))}
    when = realm.clock() + 100
    policy = realm.policy()
    realm.set_policy(references=(Reference("reader", "simulated", pcrs, revoked_at=when), *policy.references[1:]))
    enclave = realm.enclave()
    signed = [realm.signed_by(enclave, wanted) for _ in range(2)]
    realm.ask("release", signed[0], Release)
    realm.clock.now = when
    assert realm.code(lambda: realm.ask("release", signed[1], Release)) == "measurement_revoked"
    assert realm.code(realm.enclave) == "appraisal_revocation"


def realm_registers(name: str) -> list[bytes]:
    return [(f"{name}-{index}".encode() * 48)[:48] for index in range(3)]


@pytest.mark.threat("SVC-12")
def test_check_6_replay_of_a_request_also_after_a_restart(realm: Any, wanted: ReleaseRequest) -> None:
    signed = realm.signed_by(realm.enclave(), wanted)
    realm.ask("release", signed, Release)
    assert realm.code(lambda: realm.ask("release", signed, Release)) == "replayed"
    realm.reopen()
    assert realm.code(lambda: realm.ask("release", signed, Release)) == "replayed"
    assert len(realm.entries("release")) == 1


@pytest.mark.threat("SVC-2")
def test_check_6_nobody_burns_anothers_nonce_or_fills_the_table(realm: Any, wanted: ReleaseRequest) -> None:
    enclave, thief = realm.enclave(), SigningKey.generate()
    good = realm.signed_by(enclave, wanted)
    rows = realm.rows()
    for changes in ({"signer": thief}, {"token": "x"}, {"audience": "another"}):
        bad = realm.signed_by(enclave, wanted, nonce=good.nonce, **changes)
        assert realm.code(lambda bad=bad: realm.ask("release", bad, Release))
    assert realm.rows() == rows
    realm.ask("release", good, Release)


@pytest.mark.threat("SVC-12")
def test_check_6_a_refused_action_uses_the_nonce_up(realm: Any, wanted: ReleaseRequest) -> None:
    signed = realm.signed_by(realm.enclave("other"), wanted)
    assert realm.code(lambda: realm.ask("release", signed, Release)) == "rule_denied"
    realm.rule("a/b", readers=("other",))
    assert realm.code(lambda: realm.ask("release", signed, Release)) == "replayed"


@pytest.mark.threat("SVC-13")
def test_check_7_an_unregistered_file(realm: Any, wanted: ReleaseRequest) -> None:
    facts = sealed.public_facts(realm.seal(epoch=2))
    assert realm.code(lambda: realm.enclave().unlock(facts)) == "unknown_asset"


@pytest.mark.threat("SVC-13")
def test_check_7_a_rolled_back_file(realm: Any, path: Any) -> None:
    newer = realm.seal(epoch=2)
    realm.register(newer)
    enclave = realm.enclave()
    assert realm.code(lambda: sealed.load_file(path, identity=enclave)) == "rolled_back"
    sealed.load_file(newer, identity=enclave)
    assert realm.code(lambda: realm.register(path)) == "rolled_back"


@pytest.mark.threat("SVC-14")
def test_check_8_the_rule_does_not_name_the_measurement(realm: Any, path: Any) -> None:
    enclave = realm.enclave("other")
    assert realm.code(lambda: sealed.load_file(path, identity=enclave)) == "rule_denied"
    realm.rule("a/b")
    assert realm.code(lambda: sealed.load_file(path, identity=realm.enclave(rank=1))) == "rule_denied"
    assert not realm.entries("release")


@pytest.mark.threat("SVC-14")
def test_an_asset_without_a_rule_is_released_to_nobody(realm: Any) -> None:
    path = realm.seal("no/rule")
    realm.register(path)
    assert realm.code(lambda: sealed.load_file(path, identity=realm.enclave())) == "rule_denied"


@pytest.mark.threat("SVC-7")
def test_a_failing_commit_releases_nothing(realm: Any, path: Any) -> None:
    enclave = realm.enclave()
    real = realm.state._database
    realm.fail("COMMIT")
    assert realm.code(lambda: enclave.unlock(sealed.public_facts(path))) == "storage"
    realm.state._database = real
    assert not realm.entries("release")
    enclave.unlock(sealed.public_facts(path))
    assert len(realm.entries("release")) == 1


@pytest.mark.threat("SVC-7")
def test_every_release_is_in_the_log_before_it_leaves(
    realm: Any, path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = Release.make

    def make(*arguments: Any) -> Any:
        assert not realm.state._database.in_transaction
        seen.append(len(realm.entries("release")))
        return real(*arguments)

    monkeypatch.setattr(Release, "make", make)
    for number in range(3):
        sealed.load_file(path, identity=realm.enclave(rank=number))
    assert seen == [1, 2, 3]


@pytest.mark.threat("SVC-15")
def test_nothing_changes_between_a_check_and_the_release(
    realm: Any, path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner takes the rule away while the keys are being unwrapped: the change waits for the release."""
    order: list[str] = []
    real = Broker.allow
    threads: list[threading.Thread] = []

    def allow(*arguments: Any) -> None:
        real(*arguments)
        threads.append(threading.Thread(target=lambda: (realm.rule("a/b"), order.append("rule"))))
        threads[-1].start()
        threads[-1].join(0.2)
        order.append("checked")

    monkeypatch.setattr(Broker, "allow", staticmethod(allow))
    sealed.load_file(path, identity=realm.enclave())
    threads[0].join(5)
    assert order == ["checked", "rule"]
    monkeypatch.undo()


def test_a_subset_of_compartments_is_released_alone(realm: Any) -> None:
    path = realm.seal("c/d", compartments={"only": ["w"]})
    realm.register(path)
    realm.rule("c/d", readers=("reader",))
    digest = sealed.public_facts(path).digest
    asked = ReleaseRequest(digest, ["only"], b"n" * 32)
    enclave = realm.enclave()
    release = realm.ask("release", realm.signed_by(enclave, asked), Release)
    context = release.verify(enclave.certificate, asked, enclave.result.instance)
    assert context.compartments == ["only"]
    assert realm.entries("release")[-1]["compartments"] == ["only"]
    odd = ReleaseRequest(digest, ["none such"], b"n" * 32)
    assert realm.code(lambda: realm.ask("release", realm.signed_by(enclave, odd), Release)) == "usage"


def registration(realm: Any, path: Any, asset: str = "a/b") -> RegisterRequest:
    facts = sealed.public_facts(path)
    return RegisterRequest(asset, facts.header, facts.directory)


@pytest.mark.threat("SVC-16")
def test_an_enclave_registers_what_it_may_write_and_nothing_else(realm: Any) -> None:
    writer, reader = realm.enclave("writer"), realm.enclave("reader", rank=1)
    realm.rule("a/b", readers=("reader",), writers=("writer",))

    def offer(enclave: Any, path: Any, asset: str = "a/b") -> str:
        signed = realm.signed_by(enclave, registration(realm, path, asset))
        return str(realm.code(lambda: realm.ask("register", signed, Registered)))

    assert offer(reader, realm.seal(sign=reader._signing)) == "rule_denied"
    assert offer(writer, realm.seal("c/d", sign=writer._signing), "c/d") == "rule_denied"
    assert offer(writer, realm.seal("c/d", sign=writer._signing)) == "unauthenticated_origin"
    assert offer(writer, realm.seal(sign=SigningKey.generate())) == "unauthenticated_origin"
    assert offer(writer, realm.seal(sign=realm.owner)) == "unauthenticated_origin"
    assert offer(writer, realm.seal(sign=writer._signing)) == ""
    assert offer(writer, realm.seal(sign=writer._signing)) == "rolled_back"
    assert offer(writer, realm.seal(epoch=2, sign=writer._signing)) == ""


def test_a_file_that_the_service_cannot_open_is_not_registered(realm: Any) -> None:
    from isolate.crypto.kem import Identity

    path = realm.folder / "x.sealed"
    sealed.save_file(
        {}, path, recipients=[Identity.generate().recipient], sign=realm.owner, model_id="a/b", epoch=1
    )
    assert realm.code(lambda: realm.register(path)) == "no_recipient"
