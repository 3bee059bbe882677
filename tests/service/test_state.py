"""The state: one writer, whole transactions, typed errors, and what lies on the disk in the clear."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from isolate.crypto.kem import Identity
from isolate.crypto.secret import Secret
from isolate.crypto.signing import SigningKey
from isolate.errors import IsolateError, NoRecipient, RefusedError, StorageError, UsageError
from isolate.messages.certificate import BundleRequest, TrustBundle
from isolate.sealed.recipients import Passphrase
from isolate.service import state as states
from isolate.service.clock import SteadyClock
from isolate.service.keyring import Keyring
from isolate.service.state import State, create

CLOCK = 1_780_000_000
UNLOCK = Passphrase("what opens its keys", memory=64, passes=1)


def make(folder: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "owner": SigningKey.generate(), "name": "svc", "lineage": "acme", "recovery": [], "unlock": UNLOCK,
        "now": CLOCK,
    }  # fmt: skip
    return create(folder, **(fields | changes))


def opened(folder: Path, **changes: Any) -> State:
    fields: dict[str, Any] = {"unlock": UNLOCK, "clock": lambda: CLOCK}
    return State(folder, **(fields | changes))


def rows(state: State) -> int:
    with state.transaction() as database:
        count: int = database.execute("SELECT count(*) FROM seen").fetchone()[0]
    return count


@pytest.mark.threat("SVC-23")
def test_a_second_writer_on_one_state(realm: Any) -> None:
    with pytest.raises(StorageError) as refused:
        State(realm.folder / "state", unlock=UNLOCK, clock=realm.clock)
    assert refused.value.code == "second_writer"
    realm.state.close()
    State(realm.folder / "state", unlock=UNLOCK, clock=realm.clock).close()


def test_a_transaction_is_whole_and_one_inside_it_is_undone_alone(realm: Any) -> None:
    state = realm.state
    before = rows(state)
    with pytest.raises(KeyError), state.transaction() as database:
        database.execute("INSERT INTO seen VALUES (?)", (b"1",))
        raise KeyError
    assert rows(state) == before
    with state.transaction() as database:
        database.execute("INSERT INTO seen VALUES (?)", (b"2",))
        with pytest.raises(KeyError), state.transaction():
            database.execute("INSERT INTO seen VALUES (?)", (b"3",))
            raise KeyError
    assert rows(state) == before + 1


def test_what_sqlite_refuses_is_a_storage_error(realm: Any) -> None:
    state = realm.state
    for sql in ("INSERT INTO seen VALUES (NULL, 1)", "no sql", "INSERT INTO meta VALUES (NULL, NULL)"):
        with pytest.raises(StorageError), state.transaction() as database:
            database.execute(sql)
    state.close()
    with pytest.raises(StorageError), state.transaction():
        pass


def test_once(realm: Any) -> None:
    state, seen = realm.state, []

    def refuse(*_: Any) -> None:
        raise RefusedError("no")

    before = rows(state)
    with pytest.raises(RefusedError):
        state.once(b"1", refuse, lambda *_: seen.append(1))
    assert (rows(state), seen) == (before, [])
    with pytest.raises(RefusedError):
        state.once(b"1", lambda _: None, refuse)
    assert rows(state) == before + 1
    with pytest.raises(RefusedError) as refused:
        state.once(b"1", lambda _: None, lambda *_: seen.append(2))
    assert refused.value.code == "replayed"
    assert state.once(b"2", lambda _: 20, lambda _, checked: checked + 1) == 21

    def half(error: IsolateError) -> Any:
        def act(database: Any, _: Any) -> None:
            database.execute("INSERT INTO revoked VALUES (x'00')")
            raise error

        return act

    # What was written before the refusal is undone, the nonce is not; what could not be done can be asked again.
    for nonce, error, kept in ((b"3", RefusedError("no"), 1), (b"4", StorageError("full"), 0)):
        before = rows(state)
        with pytest.raises(type(error)):
            state.once(nonce, lambda _: None, half(error))
        assert rows(state) == before + kept
        assert realm.rows()["revoked"] == 0


def test_every_commit_is_synced(realm: Any) -> None:
    """No kill of a process shows it: only a machine that loses its power would."""
    realm.state.close()
    with State(realm.folder / "state", unlock=realm.unlock, clock=realm.clock) as state:
        assert state._database.execute("PRAGMA synchronous").fetchone() == (2,)
        assert state._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_making_a_state(tmp_path: Path) -> None:
    certificate = make(tmp_path / "deep" / "state", recovery=[Identity.generate().recipient])
    assert len(certificate.output_recipients()) == 2
    assert stat.S_IMODE((tmp_path / "deep" / "state").stat().st_mode) == 0o700
    with pytest.raises(StorageError):
        make(tmp_path / "deep" / "state")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state"]
    for changes in ({"name": "a b"}, {"name": ""}, {"name": "a+b"}, {"lineage": ""}):
        with pytest.raises(UsageError):
            make(tmp_path / "other", **changes)
    with pytest.raises(UsageError):
        make(tmp_path / "other", recovery=[Identity.generate().recipient] * 17)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        make(tmp_path / "file" / "state")
    with pytest.raises(UsageError):
        opened(tmp_path)


def test_a_damaged_state_is_refused_and_lets_go_of_its_lock(tmp_path: Path) -> None:
    make(tmp_path / "state")
    whole = {path: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}
    for path in whole:
        for damage in (b"", b"rubbish" * 1000):
            path.write_bytes(damage)
            with pytest.raises(IsolateError):
                opened(tmp_path / "state").close()
        for each, data in whole.items():
            each.write_bytes(data)
    opened(tmp_path / "state").close()


@pytest.mark.threat("SVC-24")
def test_keys_of_another_service_are_refused(tmp_path: Path) -> None:
    """Sealed to the same passphrase: by another owner, and by the same one for another service."""
    owner = SigningKey.generate()
    certificates = [make(tmp_path / name, owner=owner, name=name) for name in ("one", "two")]
    make(tmp_path / "three")
    mine = tmp_path / "one" / "keys.sealed"
    mine.write_bytes((tmp_path / "three" / "keys.sealed").read_bytes())
    with pytest.raises(IsolateError) as refused:
        opened(tmp_path / "one")
    assert refused.value.code == "unauthenticated_origin"
    mine.write_bytes((tmp_path / "two" / "keys.sealed").read_bytes())
    with pytest.raises(StorageError) as mixed:
        opened(tmp_path / "one")
    assert mixed.value.code == "epoch_mixed"
    seeds = {name: Secret.generate(32) for name in ("release", "result", "log", "recipient-0")}
    with pytest.raises(StorageError):
        Keyring(certificates[0], seeds)


@pytest.mark.threat("SVC-25")
def test_nothing_secret_lies_in_the_state_in_the_clear(realm: Any) -> None:
    """Keys, and the authority's secret, in every file of the state and in every form that we would write."""
    import base64

    realm.asset()
    realm.enclave()
    realm.post("", "bundle", BundleRequest("acme/job", "simulated"), TrustBundle)
    state = realm.state
    secrets = {name: bytes(seed.expose()) for name, seed in state.keys.seeds.items()}
    secrets["authority"] = bytes(next(iter(realm.service.authority._opened.values())).expose())
    secrets["further"] = bytes(state.secret("further", lambda: Secret.generate(32)).expose())
    files = [path for path in (realm.folder / "state").rglob("*") if path.is_file()]
    assert {"keys.sealed", "keys-recovery.sealed", "state.db"} <= {path.name for path in files}
    for name, raw in secrets.items():
        forms = (raw, raw[:16], raw.hex().encode(), base64.urlsafe_b64encode(raw)[:40], base64.b64encode(raw)[:40])
        assert [path.name for path in files if any(form in path.read_bytes() for form in forms)] == [], name


@pytest.mark.threat("SVC-25")
def test_the_keys_open_with_the_passphrase_or_the_owners_recovery_only(realm: Any) -> None:
    realm.state.close()
    folder, wrong = realm.folder / "state", Passphrase("another", memory=64, passes=1)
    for unlock in (wrong, Identity.generate()):
        with pytest.raises(NoRecipient):
            opened(folder, unlock=unlock)
    with opened(folder, unlock=realm.recovery) as state:
        kept = state.keys
    with opened(folder) as state:
        assert state.certificate == kept.certificate
    assert "hidden" in repr(kept)
    (folder / "keys.sealed").unlink()
    with pytest.raises(StorageError):
        opened(folder)


def test_a_further_secret_is_made_once_and_outlives_a_restart(realm: Any) -> None:
    first = realm.state.secret("tls", lambda: Secret(b"one" * 11))
    realm.reopen()
    assert realm.state.secret("tls", lambda: Secret(b"two" * 11)).equals(first)
    with pytest.raises(NoRecipient):
        realm.state.keys.open("another", realm.state._meta("box/tls"))


@pytest.mark.threat("SVC-29")
def test_a_clock_that_is_set_back_brings_nothing_back(realm: Any) -> None:
    realm.clock.now += 1000
    realm.rule("a/b")
    realm.clock.now -= 500
    assert realm.state.clock() == CLOCK + 1000
    realm.rule("a/b")
    assert [entry["time"] for entry in realm.public()][-2:] == [CLOCK + 1000] * 2
    realm.state.close()
    with pytest.raises(StorageError) as refused:
        realm.open()
    assert refused.value.code == "clock_behind"
    realm.clock.now += 500 - states.MAX_BEHIND
    realm.open()
    assert realm.state.clock() == CLOCK + 1000


@pytest.mark.threat("SVC-29")
def test_a_clock_that_jumps_while_the_service_runs_is_not_followed(capsys: pytest.CaptureFixture[str]) -> None:
    wall, passed = [1000.0], [0.0]
    clock = SteadyClock(wall=lambda: wall[0], elapsed=lambda: passed[0])
    for jump in (1e9, -1e9, 0.0):
        passed[0] += 10
        wall[0] = 1000 + passed[0] + jump
        assert clock() == 1000 + passed[0]
        assert round(clock.skew()) == jump
    # Told once when it begins, and once when it is over.
    assert [capsys.readouterr().out.count(word) for word in ("clock.jumped",)] == [1]
