"""The benchmarks that need torch run, and give the figures that they name. In a process of their own: they fork."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed: the extra 'torch'"),
]

SMALL = {f"allreduce_{which}_vs_gloo" for which in ("4kib", "1mib", "4_ranks_4kib", "4_ranks_1mib")}
CHECKPOINT = {"checkpoint_save_vs_dcp", "checkpoint_load_vs_dcp"}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("allreduce", SMALL | CHECKPOINT | {"ddp_step_vs_gloo"}), ("checkpoint", CHECKPOINT)],
    ids=["allreduce", "checkpoint"],
)
def test_the_figures(name: str, wanted: set[str]) -> None:
    command = [sys.executable, "-m", "isolate", "bench", name, "--quick", "--rounds", "1", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    assert set(figures) == wanted
    assert all(value > 0 for value in figures.values())
