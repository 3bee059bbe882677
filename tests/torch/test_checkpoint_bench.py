"""The benchmark of checkpoints runs, and gives the figures that it names."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from isolate.cli import cli

pytest.importorskip("torch", reason="torch is an extra: pip install 'isolate-confidential[torch]'")


@pytest.mark.slow
def test_the_figures() -> None:
    done = CliRunner().invoke(cli, ["bench", "checkpoint", "--quick", "--rounds", "1", "--json", "-"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.output)["figures"]
    assert set(figures) == {"checkpoint_save_vs_dcp", "checkpoint_load_vs_dcp"}
    assert all(value > 0 for value in figures.values())
