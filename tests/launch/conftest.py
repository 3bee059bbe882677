"""One simulated platform for all tests here: its first launch copies and compiles the runtime."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolate.crypto.signing import SigningKey
from isolate.launch.platform import Child, Platform
from isolate.launch.root import SimulatedRoot
from isolate.launch.supervisor import Enclave

CONFIGURATION = f"""
[owner]
root = "{SigningKey.generate().verifying_key}"
lineage = "test"
[enclave]
purpose = "test"
job = "test/job"
"""


@pytest.fixture(scope="session")
def application(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes an application folder with this main.py."""

    def write(main: str, **files: str) -> Path:
        folder = tmp_path_factory.mktemp("app") / "app"
        folder.mkdir()
        (folder / "main.py").write_text(main)
        (folder / "isolate.toml").write_text(CONFIGURATION)
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        return folder

    return write


class Host:
    """Launches through a platform in this process."""

    def __init__(self, folder: Path) -> None:
        self.logs, self.count = folder / "logs", 0
        self.logs.mkdir()
        # By a relative path, as somebody types it: an enclave is started in another folder.
        self.platform = Platform(SimulatedRoot.generate(), Path(os.path.relpath(folder / "state")))

    def launch(self, application: Path, **environment: str) -> Child:
        self.count += 1
        child = self.platform.launch(f"enclave-{self.count}", application, environment, self.logs)
        self.name = f"enclave-{self.count}"
        return child

    def events(self, *names: str) -> list[dict[str, Any]]:
        """What the last enclave printed, once one of these events is there."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            found = Enclave.parse_events((self.logs / f"{self.name}.out").read_text())
            if any(one["event"] in names for one in found):
                return found
            time.sleep(0.02)
        said = (self.logs / f"{self.name}.err").read_text()
        raise AssertionError(f"no {names} from {self.name}: {found} {said}")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("platform"))
    yield host
    host.platform.stop()
