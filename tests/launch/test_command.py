"""`isolate launch`: what a host types, against a platform that listens."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isolate.cli import cli
from isolate.cli.launch import command
from isolate.crypto.signing import SigningKey
from isolate.enclave.configuration import Configuration
from isolate.launch import torchrun
from isolate.launch.measure import needs, tree
from isolate.launch.platform import Control


@pytest.fixture
def platform(host: Any, tmp_path: Path) -> str:
    address = f"unix:{tmp_path / 'platform'}"
    control = Control(host.platform, address)
    threading.Thread(target=control.run, daemon=True).start()
    return address


def launch(application: Path, platform: str, name: str) -> Any:
    arguments = ["launch", str(application), "--service", "unix:/nowhere", "--platform", platform, "--name", name]
    return CliRunner().invoke(cli, [*arguments, "--rank", "3"])


def test_it_shows_public_events_and_ends_with_the_enclave(application: Callable[..., Path], platform: str) -> None:
    main = "import os\nfrom isolate.enclave.boot import event\nevent('hello', rank=os.environ['ISOLATE_RANK'])\n"
    done = launch(application(main), platform, "says-hello")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1]) == {"event": "hello", "rank": "3"}


def test_an_enclave_that_fails_is_exit_status_1(application: Callable[..., Path], platform: str) -> None:
    done = launch(application("import isolate\nisolate.join()\n"), platform, "finds-no-service")
    assert done.exit_code == 1
    assert '"code": "service_unavailable"' in done.stdout


def test_the_guide_to_training_says_what_there_is(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (toml,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "isolate.toml").write_text(toml)
    assert needs(tree(tmp_path)) == ("torch",)
    key = str(SigningKey.generate().verifying_key)
    assert Configuration.parse(toml.replace("isolate-verify-...", key)).job == "digits/trainer"
    (line,) = (line for line in text.splitlines() if line.startswith("torchrun "))
    options = {option for parameter in command("launch").params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", line.partition("isolate launch")[2])) <= options
    for name in re.findall(r"ISOLATE_[A-Z]+", text):
        assert name in torchrun.MEETING
    for code in ("appraisal_measurement", "control_missing"):
        assert f"`{code}`" in text
        assert f"| {code} |" in (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
