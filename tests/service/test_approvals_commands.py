"""`isolate approvers`, `approve` and `export`, as people type them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isolate.cli import cli
from isolate.client import approve as approving
from isolate.crypto.kem import Identity
from isolate.crypto.signing import SigningKey
from isolate.errors import IsolateError


class Desk:
    """A folder with the keys of an owner, three approvers and a destination, and a service."""

    def __init__(self, realm: Any, folder: Path) -> None:
        self.realm, self.folder = realm, folder
        realm.owner.save(folder / "owner.key")
        self.people = [SigningKey.generate() for _ in range(3)]
        for number, one in enumerate(self.people):
            one.save(folder / f"{number}.key")
        Identity.generate().save(folder / "archive.key")
        self.sealed = realm.asset()

    def run(self, *words: Any) -> str:
        """The output; or the code of the refusal."""
        done = CliRunner().invoke(cli, [str(word) for word in words])
        if isinstance(done.exception, IsolateError):
            return done.exception.code
        assert done.exception is None, done.output
        return done.output

    def keys(self, *numbers: int) -> list[str]:
        return [str(self.folder / f"{number}.key") for number in numbers]

    def name(self, *numbers: int, approvals: tuple[str, ...] = ()) -> str:
        given = [word for one in approvals for word in ("--approval", self.folder / one)]
        return self.run(
            "approvers", "set", *self.keys(*numbers), "--threshold", 2, "--sign", self.folder / "owner.key",
            "--service", "unix:/service", "--lineage", "acme", *given,
        )  # fmt: skip

    def approve(self, number: int, *more: Any) -> str:
        return self.run(
            "approve", "a/b", "--file", self.sealed, "--to", self.folder / "archive.key", "--reason", "audit",
            "--for", self.realm.state.audience, "--sign", *self.keys(number),
            "-o", self.folder / f"{number}.approval", *more,
        )  # fmt: skip

    def export(self, *numbers: int, output: str = "plain.safetensors") -> str:
        given = [word for one in numbers for word in ("--approval", self.folder / f"{one}.approval")]
        return self.run(
            "export", "a/b", self.sealed, *given, "-i", self.folder / "archive.key", "--service", "unix:/service",
            "--owner", self.realm.owner.verifying_key, "--lineage", "acme", "-o", self.folder / output,
        )  # fmt: skip


@pytest.fixture
def desk(realm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(approving, "post", realm.post)
    monkeypatch.setattr(approving, "now", realm.clock)
    return Desk(realm, tmp_path)


def test_one_is_refused_and_two_export(desk: Desk) -> None:
    assert "group 1" in desk.name(0, 1, 2)
    assert "approved a/b" in desk.approve(0)
    assert desk.export(0) == "approvals_missing"
    assert not (desk.folder / "plain.safetensors").exists()
    assert "approved" in desk.approve(1)
    assert "exported a/b" in desk.export(0, 1)
    from safetensors.numpy import load_file

    assert load_file(desk.folder / "plain.safetensors")["w"].tolist() == [1, 2, 3, 4]
    assert desk.export(0, 1, output="again") == "replayed"


def test_what_is_in_the_way_is_found_before_the_approvals_are_used_up(desk: Desk) -> None:
    desk.name(0, 1)
    desk.approve(0)
    desk.approve(1)
    (desk.folder / "taken").write_bytes(b"")
    assert desk.export(0, 1, output="taken") == "storage"
    assert desk.approve(0) == "storage"  # no file is overwritten
    (desk.folder / "2.approval").write_text("rubbish")
    assert desk.export(0, 2) in ("malformed", "key_format")
    assert "exported" in desk.export(0, 1)


def test_an_approval_names_its_file_once(desk: Desk) -> None:
    words = ["--to", desk.folder / "archive.key", "--reason", "r", "--for", "svc/1", "--sign", *desk.keys(0)]
    for more in ([], ["--digest", "00" * 32, "--file", desk.sealed], ["--digest", "zz"], ["--digest", "00"]):
        assert desk.run("approve", "a/b", *more, *words, "-o", desk.folder / "x") == "usage"
    assert desk.run("approve", "c/d", "--file", desk.sealed, *words, "-o", desk.folder / "x") == "usage"
    assert "approved a/b" in desk.run("approve", "a/b", "--digest", "00" * 32, *words, "-o", desk.folder / "x")


def test_the_next_approvers_take_the_present_ones_word(desk: Desk) -> None:
    desk.name(0, 1)
    assert desk.name(1, 2) == "approvals_missing"
    for number in (0, 1):
        said = desk.run(
            "approvers", "approve", *desk.keys(1, 2), "--threshold", 2, "--group", 2, "--for",
            desk.realm.state.audience, "--sign", *desk.keys(number), "-o", desk.folder / f"{number}.group",
        )  # fmt: skip
        assert "approved group 2" in said
    assert desk.name(1, 2, approvals=("0.group",)) == "approvals_missing"
    assert "group 2" in desk.name(1, 2, approvals=("0.group", "1.group"))


def test_limits_of_an_asset(desk: Desk) -> None:
    said = desk.run(
        "owner", "limits", "a/b", "--uses", 5, "--holder-bytes", 1000, "--sign", desk.folder / "owner.key",
        "--service", "unix:/service", "--lineage", "acme",
    )  # fmt: skip
    assert "in force" in said
    (entry,) = desk.realm.entries("limits")
    assert (entry["uses"], entry["bytes_out"], entry["holder_bytes"]) == (5, None, 1000)
