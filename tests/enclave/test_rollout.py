"""A new version is rolled out: both run, then the old one is revoked, and nothing of it goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from isolate import sealed
from isolate.attestation.policy import Reference
from isolate.crypto.signing import SigningKey
from isolate.enclave import watch, workload
from isolate.errors import AppraisalRefused, ChannelError
from isolate.messages.invoke import Reservation

OLD, NEW = "reader", "writer"  # two versions of one program, under one name in the policy


def reference(realm: Any, image: str, **changes: Any) -> Reference:
    found = next(one for one in realm.policy().references if one.name == image)
    realm.sequence -= 1
    return Reference("program", found.kind, found.registers, **changes)


@pytest.fixture
def program(realm: Any) -> Any:
    """The old version alone is admitted, and has an asset."""
    realm.set_policy(references=(reference(realm, OLD),))
    realm.asset(readers=("program",))
    realm.rule("a/b", readers=("program",), writers=("program",))
    return realm


@pytest.mark.threat("SVC-74")
def test_both_run_and_the_old_one_is_then_revoked_for_releases_and_budgets(program: Any) -> None:
    realm, holder = program, SigningKey.generate()
    facts, token = sealed.public_facts(realm.folder / "a-b-1.sealed"), realm.grant(holder)
    old = realm.enclave(OLD)
    old.unlock(facts)
    with pytest.raises(AppraisalRefused):
        realm.enclave(NEW, rank=1)

    realm.set_policy(references=(reference(realm, OLD), reference(realm, NEW)))
    new = realm.enclave(NEW, rank=1)
    # The result of the old one is of an earlier policy: it attests anew by itself, and goes on.
    for enclave in (old, new):
        enclave.unlock(facts)
        realm.ask("reserve", realm.signed_by(enclave, realm.use(token, holder)), Reservation)

    now = realm.clock()
    realm.set_policy(references=(reference(realm, OLD, revoked_at=now), reference(realm, NEW)))
    size = len(realm.entries("release"))
    assert realm.code(lambda: old.unlock(facts)) == "appraisal_revocation"
    use = realm.signed_by(old, realm.use(token, holder))
    assert realm.code(lambda: realm.ask("reserve", use, Reservation)) == "policy_changed"
    assert len(realm.entries("release")) == size
    new.unlock(facts)


@pytest.mark.threat("SVC-74")
def test_a_revocation_in_the_future_takes_the_old_one_out_at_that_second(program: Any) -> None:
    """Under one name and one policy: what was measured decides, not what it is called."""
    realm, end = program, program.clock() + 100
    facts = sealed.public_facts(realm.folder / "a-b-1.sealed")
    realm.set_policy(references=(reference(realm, OLD, revoked_at=end), reference(realm, NEW)))
    old, new = realm.enclave(OLD), realm.enclave(NEW, rank=1)
    realm.clock.now = end - 1
    old.unlock(facts)
    realm.clock.now = end
    assert realm.code(lambda: old.unlock(facts)) == "measurement_revoked"
    new.unlock(facts)


def test_last_months_checkpoint_opens_under_the_new_code(program: Any) -> None:
    import numpy as np

    realm = program
    old = realm.enclave(OLD)
    realm.rule("run/checkpoint", readers=("program",), writers=("program",))
    old.locate = lambda asset: realm.folder / f"{asset.replace('/', '-')}.sealed"
    old.seal("run/checkpoint", {"w": np.arange(3.0)}, epoch=1)
    realm.set_policy(references=(reference(realm, NEW),))
    realm.clock.now += 31 * 86400
    new = realm.enclave(NEW)
    opened = sealed.load_file(realm.folder / "run-checkpoint.sealed", identity=new)
    assert opened["w"].tolist() == [0.0, 1.0, 2.0]
    assert realm.code(lambda: old.unlock(sealed.public_facts(realm.folder / "run-checkpoint.sealed"))) == (
        "appraisal_measurement"
    )


@pytest.mark.threat("SVC-74")
def test_a_live_channel_of_a_revoked_measurement_ends(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    realm = program
    realm.set_policy(references=(reference(realm, OLD), reference(realm, NEW)))
    address = f"unix:{tmp_path / 'peer'}"
    for name in ("ISOLATE_LISTEN", "ISOLATE_PEER"):
        monkeypatch.setenv(name, address)
    for module in (watch, workload):
        monkeypatch.setattr(module, "EVERY", 0.01)
    old, new = realm.enclave(OLD, rank=0), realm.enclave(NEW, rank=1)
    ended: list[str] = []

    def serve() -> None:
        try:
            with old.listen("gradients", rank=1) as listener, listener.accept() as peer:
                while True:
                    peer.send(peer.recv())
        except ChannelError as error:
            ended.append(error.code)

    thread = threading.Thread(target=serve)
    thread.start()
    with new.connect("gradients", rank=0, timeout=20) as peer:
        for _ in range(20):
            peer.send(b"gradient")
            assert bytes(peer.recv()) == b"gradient"
            time.sleep(0.005)
        realm.set_policy(references=(reference(realm, OLD, revoked_at=realm.clock()), reference(realm, NEW)))
        begin = time.monotonic()
        with pytest.raises(ChannelError) as refused:
            while time.monotonic() < begin + 10:
                peer.send(b"gradient")
                peer.recv()
                time.sleep(0.005)
    thread.join(20)
    assert not thread.is_alive()
    # Each end learns it by itself: of the peer, or of itself. Whoever is first ends it for both, and says why.
    whys = {"measurement_revoked", "appraisal_revocation"}
    assert whys & {refused.value.code, *ended}, (refused.value.code, ended)
