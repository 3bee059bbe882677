"""Each example runs as a reader would run it, and prints what its docstring promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# File -> lines that must stand in its output.
PROMISED = {
    "enclave_demo.py": ["'event': 'serving'", "department 2: ", "department 0: refused, budget_exhausted"],
    "seal_and_open.py": [],
}


def run(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PROMISED)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    said = run(name, tmp_path)
    assert [line for line in PROMISED[name] if line not in said] == []
