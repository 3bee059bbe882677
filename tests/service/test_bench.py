"""`isolate bench service` runs, and gives the figures that it says it gives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_benchmark_gives_its_figures() -> None:
    words = [sys.executable, "-m", "isolate", "bench", "service", "--quick", "--rounds", "1", "--json", "-"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    assert set(figures) == {"release_per_s", "attest_roundtrip_ms", "log_append_growth"}
    assert all(value > 0 for value in figures.values())
