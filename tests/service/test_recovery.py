"""An old copy of the state, a recovery, new keys, and files that are put back: what was before does not hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import sealed
from isolate.attestation.policy import SignedPolicy
from isolate.cli.serve import _set_aside
from isolate.crypto.kem import Identity
from isolate.crypto.secret import Secret
from isolate.crypto.signing import Purpose, SigningKey
from isolate.errors import IsolateError, LogRefused, Revoked, StorageError, UsageError
from isolate.messages.attest import Registered, RegisterRequest, Release, ReleaseRequest
from isolate.messages.base import Message, Signed
from isolate.messages.certificate import BundleRequest, TrustBundle
from isolate.messages.invoke import Reservation, SettleRequest
from isolate.messages.limits import AssetLimits
from isolate.messages.owner import AssetRule, Done, PolicyUpdate, Revoke, Rollback
from isolate.sealed.recipients import Passphrase
from isolate.service import keyring
from isolate.service.derived import readers_rule
from isolate.service.head import Head
from isolate.service.keyring import Keyring
from isolate.service.recovery import recover, rotate
from isolate.service.state import create
from isolate.transparency import Checkpoint
from isolate.transparency.checkpoint import sign_checkpoint


def again(realm: Any, act: Callable[..., Any] = recover, **options: Any) -> Any:
    """Stop the service, do this to its state, and start it again."""
    realm.state.close()
    fields: dict[str, Any] = {"owner": realm.owner, "unlock": realm.unlock, "clock": realm.clock}
    certificate = act(realm.folder / "state", **(fields | options))
    realm.open()
    return certificate


def restore(realm: Any, copy: Path) -> None:
    realm.state.close()
    shutil.rmtree(realm.folder / "state")
    shutil.copytree(copy, realm.folder / "state")


def back_up(realm: Any) -> Path:
    copy: Path = realm.folder / "copy"
    realm.state.close()
    shutil.copytree(realm.folder / "state", copy)
    realm.open()
    return copy


def rollback(realm: Any, path: Path, *, whole: bool = False, asset: str = "a/b") -> Registered:
    facts = sealed.public_facts(path)
    parts = (facts.header, facts.directory) if whole else (b"", b"")
    answer: Registered = realm.tell("rollback", Rollback(asset, facts.digest, *parts), Registered)
    return answer


@pytest.mark.threat("SVC-70")
def test_a_restored_state_is_recovered_and_nothing_of_before_holds(realm: Any, tmp_path: Path) -> None:
    holder, path = SigningKey.generate(), realm.asset()
    token, enclave = realm.grant(holder, uses=3), realm.enclave()
    kept_rule = realm.owner_request(AssetRule("a/b", ["reader", "other"], []))
    realm.ask("owner/rule", kept_rule, Done)
    copy = back_up(realm)
    # What the old copy will have forgotten: a narrower rule, a revocation, a newer file, uses, a stricter policy.
    realm.rule("a/b", readers=("reader",))
    realm.tell("revoke", Revoke(token.id))
    newer = realm.seal(epoch=2)
    realm.register(newer)
    used = realm.signed_by(enclave, ReleaseRequest(sealed.public_facts(newer).digest, [], bytes(32)))
    realm.ask("release", used, Release)
    stricter = realm.set_policy(max_stale=60)
    size, head = len(realm.entries()), tmp_path / "head"
    with Head(realm.state, realm.service.log, head, first=True):
        pass
    kept = head.read_text()

    restore(realm, copy)
    realm.open()
    with pytest.raises(LogRefused) as refused:
        Head(realm.state, realm.service.log, head)
    assert refused.value.code == "log_shrunk"
    restored = len(realm.entries())

    certificate = again(realm, kept=kept)
    assert (certificate.audience, certificate.origin) == ("svc/2", "isolate/svc/2")
    # 1. No request that was signed before is taken again, though this state never saw one of them.
    for route, request in (("owner/rule", kept_rule), ("release", used)):
        assert (
            realm.code(lambda route=route, request=request: realm.ask(route, request, Message)) == "wrong_audience"
        )
    # 2. Results of before are worth nothing, and no instance is known.
    assert realm.rows()["instance"] == 0
    old = realm.signed_by(enclave, ReleaseRequest(bytes(32), [], bytes(32)))
    assert realm.code(lambda: realm.ask("release", old, Release)) == "no_policy"
    # 4. No policy is in force, and none that was before comes back.
    offered = PolicyUpdate(SignedPolicy.sign(realm.policy(sequence=1), realm.owner).encode())
    assert realm.code(lambda: realm.tell("policy", offered)) == "policy_rollback"
    realm.set_policy(max_stale=stricter.max_stale)
    assert realm.code(lambda: realm.ask("release", old, Release)) == "result_signature"
    # 5. No file is released until the owner has named it, and he may name one that this state does not know.
    fresh = realm.enclave()
    assert realm.code(lambda: fresh.unlock(sealed.public_facts(path))) == "unconfirmed"
    assert realm.code(lambda: fresh.unlock(sealed.public_facts(newer))) == "unknown_asset"
    assert rollback(realm, newer, whole=True).epoch == 2
    assert realm.code(lambda: fresh.unlock(sealed.public_facts(newer))) == "rule_denied"
    realm.rule("a/b", readers=("reader",))
    fresh.unlock(sealed.public_facts(newer))
    assert realm.code(lambda: fresh.unlock(sealed.public_facts(path))) == "rolled_back"
    # 3. The handle that was revoked, and whose revocation is forgotten, has ended with every other grant of before.
    use = realm.signed_by(fresh, realm.use(token, holder))
    assert realm.code(lambda: realm.ask("reserve", use, Reservation)) == "epoch_ended"
    granted = realm.grant(holder, uses=3, epoch=2)
    realm.ask("reserve", realm.signed_by(fresh, realm.use(granted, holder)), Reservation)
    # 6. The log says what was found and what was missing, and goes on under another name and key.
    (entry,) = realm.entries("recovery")
    assert (entry["epoch"], entry["found"]["size"], entry["kept"]["size"]) == (2, restored, size)
    Checkpoint.verify(realm.service.log.checkpoint(), "isolate/svc/2", certificate.log_key.ed25519)
    with pytest.raises(LogRefused):
        Checkpoint.verify(kept, "isolate/svc/2", certificate.log_key.ed25519)


@pytest.mark.threat("SVC-70")
def test_a_recovery_that_is_interrupted_serves_nothing_until_it_is_done(
    realm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(Keyring, "save", fail)
        with pytest.raises(StorageError):
            again(realm)
    with pytest.raises(StorageError) as refused:
        realm.open()
    assert refused.value.code == "epoch_mixed"
    assert recover(
        realm.folder / "state", owner=realm.owner, unlock=realm.unlock, clock=realm.clock
    ).epoch == 3  # fmt: skip
    realm.open()
    assert [entry["epoch"] for entry in realm.entries("recovery")] == [2, 3]


@pytest.mark.threat("SVC-70")
def test_an_old_database_does_not_go_with_newer_keys(realm: Any) -> None:
    copy = back_up(realm)
    again(realm)
    realm.state.close()
    for path in copy.glob("state.db*"):
        shutil.copy(path, realm.folder / "state" / path.name)
    with pytest.raises(StorageError) as refused:
        realm.open()
    assert refused.value.code == "epoch_mixed"


@pytest.mark.threat("SVC-70")
def test_a_use_that_was_open_at_a_recovery_lets_nothing_out(realm: Any) -> None:
    """The enclave lives on, with the keys that it reserved under; its use was even revoked, which is forgotten."""
    holder = SigningKey.generate()
    realm.asset()
    enclave, token = realm.enclave(), realm.grant(holder)
    use = realm.use(token, holder)
    reserved = realm.ask("reserve", realm.signed_by(enclave, use), Reservation)
    copy = back_up(realm)
    realm.tell("revoke", Revoke(token.id))
    restore(realm, copy)
    realm.open()
    again(realm)
    realm.set_policy()
    realm.rule("a/b", readers=("reader",))
    settle = SettleRequest(reserved.invocation, 0, "")
    assert realm.code(lambda: enclave.settle(settle, reserved.invocation)) == "replayed"


@pytest.mark.threat("BUD-5")
def test_accounts_of_asset_and_holder_go_on_from_what_the_copy_knows(realm: Any, till: Any) -> None:
    """Fresh grants of the next epoch begin no fresh account; what came after the copy is forgotten, and told so."""
    holder = SigningKey.generate()
    realm.tell("limits", AssetLimits("a/b", 3, None, 2, None))
    assert till.use(realm.grant(holder), holder) == ""
    copy = back_up(realm)
    assert till.use(realm.grant(holder), holder) == ""
    restore(realm, copy)
    realm.open()
    again(realm)
    realm.set_policy()
    realm.rule("a/b", readers=("reader",))
    desk, stranger = type(till)(realm, realm.enclave(rank=1)), SigningKey.generate()
    for one, expected in ((holder, ["", "budget_exhausted"]), (stranger, ["", "budget_exhausted"])):
        token = realm.grant(one, epoch=2)
        assert [desk.use(token, one) for _ in range(2)] == expected


@pytest.mark.threat("SVC-70")
def test_stolen_keys_sign_no_certificates_after_a_recovery(realm: Any) -> None:
    def roots() -> list[bytes]:
        found: TrustBundle = realm.post("", "bundle", BundleRequest("acme/job", "simulated"), TrustBundle)
        return found.roots

    before, tls = roots(), bytes(realm.state.secret("tls", lambda: Secret.generate(32)).expose())
    again(realm)
    assert not set(roots()) & set(before)
    assert bytes(realm.state.secret("tls", lambda: Secret.generate(32)).expose()) != tls


@pytest.mark.threat("SVC-70")
def test_after_a_recovery_no_enclave_makes_the_next_epoch_before_the_owner_named_the_last(realm: Any) -> None:
    realm.asset()
    again(realm)
    realm.set_policy()
    realm.rule("a/b", readers=("reader",), writers=("writer",))
    writer = realm.enclave("writer")
    path = realm.seal(epoch=2, sign=writer._signing)
    facts = sealed.public_facts(path)
    request = RegisterRequest("a/b", facts.header, facts.directory)
    ask = lambda: realm.ask("register", realm.signed_by(writer, request), Registered)  # noqa: E731
    assert realm.code(ask) == "unconfirmed"
    rollback(realm, realm.folder / "a-b-1.sealed")
    assert ask().epoch == 2


@pytest.mark.threat("SVC-70")
def test_an_enclave_does_not_go_back_to_an_old_copy_that_still_runs(realm: Any) -> None:
    """A forged refusal makes it attest anew: not with the service as it was before its keys were renewed."""
    path, copy = realm.asset(), back_up(realm)
    realm.clock.now += 60
    again(realm, rotate)
    enclave = realm.enclave()
    restore(realm, copy)
    realm.open()
    assert realm.code(lambda: enclave.unlock(sealed.public_facts(path))) == "service_superseded"


@pytest.mark.threat("SVC-71")
def test_keys_of_before_a_rotation_do_not_go_with_what_came_after(
    realm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {path: path.read_bytes() for path in (realm.folder / "state").glob("keys*.sealed")}
    again(realm, rotate)
    realm.state.close()
    new = {path: path.read_bytes() for path in old}
    for path, content in old.items():
        path.write_bytes(content)
    with pytest.raises(StorageError) as refused:
        realm.open()
    assert refused.value.code == "epoch_mixed"
    for path, content in new.items():
        path.write_bytes(content)
    realm.open()
    # Interrupted between the two files: the keys of before are still in use, and the copy for recovery holds more.
    real = sealed.save_file

    def fail(tensors: Any, path: Any, **options: Any) -> bytes:
        if Path(path).name == "keys.sealed":
            raise StorageError("no space left")
        return real(tensors, path, **options)

    with monkeypatch.context() as broken:
        broken.setattr(keyring.sealed, "save_file", fail)
        with pytest.raises(StorageError):
            again(realm, rotate)
    realm.open()
    path = realm.asset("c/d")
    new_pass = Passphrase("a new one", memory=64, passes=1)
    old_unlock, realm.unlock = realm.unlock, new_pass
    again(realm, rotate, unlock=realm.recovery, new=new_pass)
    realm.enclave().unlock(sealed.public_facts(path))
    assert old_unlock is not new_pass


@pytest.mark.threat("SVC-70")
def test_what_was_derived_has_ended_with_its_handle(realm: Any) -> None:
    handle = b"h" * 32
    with realm.state.transaction() as database:
        database.execute("INSERT INTO derived VALUES ('a/b/derived', 'a/b', ?)", (handle,))
    again(realm)
    with realm.state.transaction() as database:
        assert database.execute("SELECT handle FROM revoked").fetchall() == [(handle,)]
        with pytest.raises(Revoked):
            readers_rule(database, "a/b/derived")


def test_a_checkpoint_that_cannot_be_set_aside_is_said_and_kept(tmp_path: Path) -> None:
    kept, taken = tmp_path / "head", tmp_path / "head.before-2"
    kept.write_text("note")
    taken.mkdir()
    with pytest.raises(StorageError, match=r"cannot move .*/head: Is a directory .*begins one more epoch"):
        _set_aside(str(kept), 2)
    taken.rmdir()
    _set_aside(str(kept), 2)
    assert not kept.exists() and taken.read_text() == "note"


@pytest.mark.threat("SVC-70")
def test_a_recovery_is_run_again_beside_the_checkpoint_of_an_earlier_epoch(realm: Any) -> None:
    """It was interrupted before the kept file was put aside: that note is of a log that has ended."""
    note = realm.service.log.checkpoint()
    again(realm)
    assert again(realm, kept=note).epoch == 3
    assert realm.entries("recovery")[-1]["kept"] is None
    # A note of another service is still no note of ours.
    other = sign_checkpoint(SigningKey.generate(), "isolate/other/1", 1, bytes(32))
    with pytest.raises(LogRefused):
        again(realm, kept=other)


@pytest.mark.threat("SVC-70")
def test_a_service_that_is_made_again_takes_nothing_of_the_one_before(tmp_path: Path) -> None:
    owner, unlock = SigningKey.generate(), Passphrase("a passphrase", memory=64, passes=1)
    made = {"owner": owner, "name": "svc", "lineage": "acme", "recovery": [], "unlock": unlock}
    audiences = [create(tmp_path / str(now), now=now, **made).audience for now in (1_780_000_000, 1_780_000_001)]
    assert len(set(audiences)) == 2
    request = Signed.make(Purpose.OWNER_REQUEST, owner, Revoke(bytes(32)).encode(), bytes(32), audiences[0])
    with pytest.raises(IsolateError) as refused:
        request.verify(Purpose.OWNER_REQUEST, audiences[1])
    assert refused.value.code == "wrong_audience"


@pytest.mark.threat("SVC-71")
def test_keys_are_rotated_and_what_was_sealed_before_still_opens(
    realm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, enclave = realm.asset(), realm.enclave()
    before, note = realm.state.certificate, realm.service.log.checkpoint()
    realm.clock.now += 89 * 86400
    after = again(realm, rotate)
    for name in ("release", "result", "recipient"):
        assert getattr(after, name) != getattr(before, name)
    assert (after.log, after.audience) == (before.log, before.audience)
    assert after.valid_at(realm.clock() + 89 * 86400)
    assert not before.valid_at(realm.clock() + 89 * 86400)
    # The file is sealed to the former recipient; the enclave, which knows the former keys, attests anew by itself.
    asked = len(realm.carried)
    enclave.unlock(sealed.public_facts(path))
    assert [route for route, _ in realm.carried[asked:]] == ["challenge", "attest", "release"]
    realm.register(realm.seal(epoch=2))
    assert [entry["kind"] for entry in realm.entries() if entry["kind"] == "keys"] == ["keys"]
    Checkpoint.verify(note, after.origin, after.log_key.ed25519)
    monkeypatch.setattr(keyring, "MAX_FORMER", 3)
    for _ in range(3):
        realm.clock.now += 86400
        again(realm, rotate)
    assert len(realm.state.keys.identities) == 3


@pytest.mark.threat("SVC-71")
def test_a_lost_passphrase_is_no_lost_service(realm: Any) -> None:
    path, new = realm.asset(), Passphrase("a new one", memory=64, passes=1)
    with pytest.raises(UsageError):
        again(realm, rotate, unlock=realm.recovery)
    old, realm.unlock = realm.unlock, new
    again(realm, rotate, unlock=realm.recovery, new=new)
    realm.enclave().unlock(sealed.public_facts(path))
    realm.state.close()
    with pytest.raises(IsolateError) as refused:
        rotate(realm.folder / "state", owner=realm.owner, unlock=old, clock=realm.clock)
    assert refused.value.code == "no_recipient"


@pytest.mark.threat("SVC-71")
@pytest.mark.parametrize("act", [rotate, recover])
def test_nobody_but_the_owner_makes_new_keys(realm: Any, act: Callable[..., Any]) -> None:
    before, size = realm.state.certificate, len(realm.entries())
    with pytest.raises(UsageError):
        again(realm, act, owner=SigningKey.generate())
    realm.open()
    assert (realm.state.certificate, len(realm.entries())) == (before, size)


@pytest.mark.threat("SVC-72")
def test_a_file_is_put_back_by_the_owner_and_logged(realm: Any) -> None:
    first, enclave = realm.asset(), realm.enclave()
    second = realm.seal(epoch=2)
    realm.register(second)
    assert realm.code(lambda: enclave.unlock(sealed.public_facts(first))) == "rolled_back"
    back = rollback(realm, first)
    assert (back.epoch, realm.entries("rollback")) == (
        1, [{"kind": "rollback", "asset": "a/b", "digest": back.digest}]
    )  # fmt: skip
    enclave.unlock(sealed.public_facts(first))
    assert realm.code(lambda: enclave.unlock(sealed.public_facts(second))) == "rolled_back"
    # What comes next is above everything that ever was, not above what was put back.
    assert realm.code(lambda: realm.register(realm.seal(epoch=2))) == "rolled_back"
    realm.register(realm.seal(epoch=3))
    realm.reopen()
    assert realm.code(lambda: enclave.unlock(sealed.public_facts(first))) == "rolled_back"


@pytest.mark.threat("SVC-72")
def test_a_rollback_to_what_nobody_named_is_refused(realm: Any, tmp_path: Path) -> None:
    realm.asset()
    size = len(realm.entries())
    other = realm.seal("a/c")
    stranger = realm.seal(epoch=7, sign=SigningKey.generate())
    twin = realm.seal(epoch=1)
    for path, options, code in (
        (other, {}, "unknown_asset"),
        (other, {"whole": True}, "unauthenticated_origin"),
        (twin, {"whole": True}, "rolled_back"),
    ):
        assert realm.code(lambda path=path, options=options: rollback(realm, path, **options)) == code
    # A stranger's file may be named, digest by digest; not under another's digest.
    facts = sealed.public_facts(stranger)
    forged = Rollback("a/b", bytes(32), facts.header, facts.directory)
    assert realm.code(lambda: realm.tell("rollback", forged, Registered)) == "unauthenticated_origin"
    thief = realm.owner_request(Rollback("a/b", facts.digest, b"", b""), SigningKey.generate())
    assert realm.code(lambda: realm.ask("owner/rollback", thief, Registered)) == "not_owner"
    unsealable = tmp_path / "x.sealed"
    sealed.save_file(
        {"w": np.zeros(1)}, unsealable, recipients=[Identity.generate().recipient],
        sign=realm.owner, model_id="a/b", epoch=9,
    )  # fmt: skip
    assert realm.code(lambda: rollback(realm, unsealable, whole=True)) == "no_recipient"
    assert len(realm.entries()) == size
