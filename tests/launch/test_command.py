"""`isolate launch`: what a host types, against a platform that listens."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isolate.cli import cli
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
