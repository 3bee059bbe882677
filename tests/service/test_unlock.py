"""What opens the service's keys: made once, for its user alone, and never a word that somebody else put there."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from isolate.cli.unlock import SHORTEST, make_passphrase, unlock
from isolate.errors import StorageError, UsageError


@pytest.mark.threat("SVC-25")
def test_a_passphrase_file_is_made_once_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    made = make_passphrase(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text().strip()) >= 40
    again = unlock(str(path), None)
    assert again.text.equals(made.text)  # type: ignore[union-attr]
    assert make_passphrase(str(path)).text.equals(made.text)


@pytest.mark.threat("SVC-25")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_passphrase_that_others_read_or_change_opens_nothing(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "passphrase"
    path.write_text("long enough for anybody")
    path.chmod(mode)
    for make in (True, False):
        with pytest.raises(UsageError):
            unlock(str(path), None, make=make)


@pytest.mark.threat("SVC-25")
def test_a_service_is_made_with_no_short_passphrase_and_none_behind_a_link(tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    path.write_text("x" * (SHORTEST - 1))
    path.chmod(0o600)
    with pytest.raises(UsageError):
        make_passphrase(str(path))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((StorageError, UsageError)):
        make_passphrase(str(tmp_path / "link"))
    assert not (tmp_path / "elsewhere").exists()
