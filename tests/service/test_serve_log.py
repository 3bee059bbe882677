"""`isolate serve --checkpoint` as a process, and `isolate log verify` over its socket."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isolate.cli import cli
from isolate.client.owner import Owner
from isolate.crypto.signing import SigningKey
from isolate.errors import ServiceUnavailable
from isolate.messages.http import fetch


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "isolate", *words]


def isolate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, check=False, timeout=60)


@contextmanager
def served(folder: Path, *words: str, end: int = signal.SIGTERM) -> Iterator[str]:
    address = f"unix:{folder}/socket"
    line = command("serve", "--state", f"{folder}/state", "--listen", address, "--checkpoint", f"{folder}/head")
    line += ["--passphrase-file", f"{folder}/passphrase"]
    with subprocess.Popen([*line, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert any("serving on" in said for said in process.stdout)
            yield address
        finally:
            process.send_signal(end)
            process.communicate(timeout=20)


@pytest.fixture
def key(tmp_path: Path) -> Any:
    made = SigningKey.generate()
    made.save(tmp_path / "owner.key")
    return made


@pytest.mark.threat("LOG-23")
def test_a_restored_service_does_not_start(tmp_path: Path, key: Any) -> None:
    head, seen = tmp_path / "head", tmp_path / "seen"
    check = ["log", "verify", "--owner", str(key.verifying_key), "--remember", str(seen), "--json", "--service"]
    with served(tmp_path, "--init", str(tmp_path / "owner.key"), "--name", "svc") as address:
        owner = Owner(key, service=address, lineage="default")
        for number in range(20):
            owner.set_rule(f"asset/{number % 3}")
        done = CliRunner().invoke(cli, [*check, address])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["kinds"] == {"rule": 20}
        with pytest.raises(ServiceUnavailable):
            fetch(address, "/log/tile/0/002", most=1 << 20)
        with pytest.raises(ServiceUnavailable):
            fetch(address, "/log/tile/0/000.p/20", most=639)
    assert head.read_text().splitlines()[1] == "20"
    copy = shutil.copytree(tmp_path / "state", tmp_path / "copy")
    with served(tmp_path) as address:
        Owner(key, service=address, lineage="default").set_rule("asset/new")
        done = CliRunner().invoke(cli, [*check, address])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["remembered"] == 20
    assert head.read_text().splitlines()[1] == "21"
    shutil.rmtree(tmp_path / "state")
    shutil.copytree(copy, tmp_path / "state")
    again = [
        "serve",
        "--state",
        f"{tmp_path}/state",
        "--listen",
        f"unix:{tmp_path}/socket",
        "--checkpoint",
        str(head),
        "--passphrase-file",
        str(tmp_path / "passphrase"),
    ]
    done = isolate(*again)
    assert done.returncode == 1
    assert "log_shrunk" in done.stderr
    # What a client remembers serves in its place.
    head.unlink()
    done = isolate(*again)
    assert (done.returncode, "checkpoint_missing" in done.stderr) == (1, True)
    shutil.copyfile(seen, head)
    assert "log_shrunk" in isolate(*again).stderr
