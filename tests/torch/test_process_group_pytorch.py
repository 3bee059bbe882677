"""PyTorch's own distributed tests on this backend: pytorch_tests.json says which pass, and why the rest do not.

CPU, torch 2.13.0: of 285 tests 122 pass, by as many ranks as each asks for. Of the others torch skips 151, nearly
all because they need GPUs; twelve need CUDA devices, NCCL, gloo by name or sparse tensors. The rest of that package
tests no backend: rpc has a transport of its own, and there are helpers for tests of FSDP, DTensor and so on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the extra `torch` is not installed")
pytest.importorskip("expecttest", reason="expecttest is not installed, which torch's own tests need")

HERE = Path(__file__).parent
LIST = json.loads((HERE / "pytorch_tests.json").read_text(encoding="utf-8"))
PASSED: dict[str, list[str]] = LIST["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", PASSED)
def test_those_of_pytorchs_tests_that_any_backend_can_pass(ranks: str) -> None:
    names = PASSED[ranks]
    done = subprocess.run(
        [sys.executable, str(HERE / "pytorch_tests.py"), ranks, *names],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    there, *found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one for one in found if one["outcome"] != "passed"] == []
    assert [one["test"] for one in found] == names
    if metadata.version("torch").startswith("2.13.0"):
        listed = [name for names in (*PASSED.values(), LIST["not"]) for name in names]
        assert sorted(listed) == there["all"], "the list is not of all tests"
