"""PyTorch's own distributed tests on this backend: pytorch_tests.json says which pass, and why not.

Three ranks, CPU, torch 2.13.0: of 285 tests 93 pass. The others need GPUs or more ranks, and torch skips them, or
they are written for gloo or NCCL by name; the reason stands beside each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the extra `torch` is not installed")
pytest.importorskip("expecttest", reason="expecttest is not installed, which torch's own tests need")

HERE = Path(__file__).parent
LIST = json.loads((HERE / "pytorch_tests.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_those_of_pytorchs_tests_that_any_backend_can_pass() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "pytorch_tests.py"), "3", *LIST["passed"]],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(LIST["passed"])
    assert [one for one in found if one["outcome"] != "passed"] == []
