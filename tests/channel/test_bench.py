"""`isolate bench channels` runs, names the figures that are promised, and draws them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from isolate.cli import cli
from isolate.cli.bench.plot import draw
from isolate.errors import MissingExtra, StorageError

PROMISED = {
    "tcp_1mib_vs_plain", "tcp_1mib_vs_tls13", "unix_1mib_vs_plain", "shm_1mib_vs_memcpy_ring",
    "aes_gcm_tcp_1mib_vs_tls13", "rtt_64b_vs_plain", "handshake_vs_mtls", "peak_traced_bytes_per_record",
}  # fmt: skip
BODY = {
    "machine": {"cpu": "a CPU", "cores": 2},
    "rounds": 3,
    "figures": {"tcp_1mib_vs_plain": 0.9, "rtt_64b_vs_plain": 1.3, "cpu_seconds_per_gb_tcp": 0.4},
}


@pytest.mark.slow
def test_the_benchmark_runs_and_names_its_figures() -> None:
    done = CliRunner().invoke(cli, ["bench", "channels", "--quick", "--rounds", "1", "--json", "-"])
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert set(body["figures"]) >= PROMISED and body["rounds"] == 1
    assert all(value > 0 for value in body["figures"].values())
    assert body["figures"]["peak_traced_bytes_per_record"] <= 4096


@pytest.mark.extra
def test_the_plot_is_an_svg_that_says_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    draw(BODY, str(tmp_path / "a.svg"), title="isolate bench channels")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml") and "isolate bench channels" in text
    for part in ("TCP 1 MiB", "0.90", "1.30", "0.4", "a CPU"):
        assert part in text
    draw(BODY, str(tmp_path / "b.svg"), title="isolate bench channels")
    assert (tmp_path / "b.svg").read_text(encoding="utf-8") == text
    with pytest.raises(StorageError):
        draw(BODY, str(tmp_path / "no" / "folder.svg"), title="x")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="bench"):
        draw(BODY, str(tmp_path / "a.svg"), title="x")
