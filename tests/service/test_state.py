"""The state: one writer, whole transactions, typed errors, and what lies on the disk in the clear."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from isolate.crypto.kem import Identity
from isolate.crypto.signing import SigningKey
from isolate.errors import IsolateError, RefusedError, StorageError, UsageError
from isolate.service.state import State, create

CLOCK = 1_780_000_000


def make(folder: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "owner": SigningKey.generate(), "name": "svc", "lineage": "acme", "recovery": [], "now": CLOCK,
    }  # fmt: skip
    return create(folder, **(fields | changes))


def rows(state: State) -> int:
    with state.transaction() as database:
        count: int = database.execute("SELECT count(*) FROM seen").fetchone()[0]
    return count


@pytest.mark.threat("SVC-23")
def test_a_second_writer_on_one_state(realm: Any) -> None:
    with pytest.raises(StorageError) as refused:
        State(realm.folder / "state", clock=realm.clock)
    assert refused.value.code == "second_writer"
    realm.state.close()
    State(realm.folder / "state", clock=realm.clock).close()


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


def test_making_a_state(tmp_path: Path) -> None:
    certificate = make(tmp_path / "deep" / "state", recovery=[Identity.generate().recipient])
    assert len(certificate.output_recipients()) == 2
    for folder in (tmp_path / "deep" / "state", tmp_path / "deep" / "state" / "keys"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
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
        State(tmp_path, clock=lambda: CLOCK)


def test_a_damaged_state_is_refused_and_lets_go_of_its_lock(tmp_path: Path) -> None:
    make(tmp_path / "state")
    whole = {path: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}
    for path in whole:
        for damage in (b"", b"rubbish" * 1000):
            path.write_bytes(damage)
            with pytest.raises(IsolateError):
                State(tmp_path / "state", clock=lambda: CLOCK).close()
        for each, data in whole.items():
            each.write_bytes(data)
    State(tmp_path / "state", clock=lambda: CLOCK).close()


@pytest.mark.threat("SVC-24")
def test_keys_of_another_service_do_not_go_with_this_certificate(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "two")
    for name in ("release.key", "result.key", "log.key", "recipient.key"):
        mine = tmp_path / "one" / "keys" / name
        kept = mine.read_bytes()
        mine.write_bytes((tmp_path / "two" / "keys" / name).read_bytes())
        with pytest.raises(StorageError):
            State(tmp_path / "one", clock=lambda: CLOCK)
        mine.write_bytes(kept)


@pytest.mark.threat("SVC-25")
def test_keys_at_rest_are_not_sealed_and_lie_in_the_key_files_alone(realm: Any) -> None:
    """What threat-model.md says of the state's folder: its keys lie in the clear, for its own user to read."""
    import base64

    realm.asset()
    realm.enclave()
    state = realm.state
    secrets = {
        "release.key": state.release_key._seed,
        "result.key": state.result_key._seed,
        "log.key": state.log_key._seed,
        "recipient.key": state.identity._seed,
    }
    files = [path for path in (realm.folder / "state").rglob("*") if path.is_file()]
    for name, secret in secrets.items():
        raw = bytes(secret.expose())
        forms = (raw, raw.hex().encode(), base64.urlsafe_b64encode(raw)[:40])
        assert [path.name for path in files if any(form in path.read_bytes() for form in forms)] == [name]
    for path in (realm.folder / "state" / "keys").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
