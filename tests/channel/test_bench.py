"""`isolate bench channels` runs, names the figures that are promised, and draws them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from isolate.cli import cli
from isolate.cli.bench.plot import better, draw, groups, label
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
    for part in ("TCP 1 MiB", "0.90", "1.30", "0.4", "a CPU", "3 paired rounds", "less is better"):
        assert part in text
    # With no ratio there is nothing to draw, and the figures are said all the same.
    draw({**BODY, "rounds": 1, "figures": {"nitro_verify_ms": 1.5}}, str(tmp_path / "c.svg"), title="x")
    plain = (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert "nitro verify (ms)" in plain and "1 paired round<" in plain and "better" not in plain
    draw(BODY, str(tmp_path / "b.svg"), title="isolate bench channels")
    assert (tmp_path / "b.svg").read_text(encoding="utf-8") == text
    with pytest.raises(StorageError):
        draw(BODY, str(tmp_path / "no" / "folder.svg"), title="x")


def test_each_ratio_stands_once_in_a_group_and_costs_are_told_from_throughput() -> None:
    figures = dict.fromkeys([*PROMISED, "peak_memory_vs_tensors", "invoke_uncommitted_vs_channel_rpc"], 1.2)
    found = groups(figures)
    names = [name for _, rows in found for name, _, _ in rows]
    assert sorted(names) == sorted(set(figures) - {"peak_traced_bytes_per_record"})
    assert [heading for heading, _ in found][-1] == "times and costs: less is better"
    assert {name for name, _, value in found[-1][1] if not better(name, value)} == {
        "rtt_64b_vs_plain", "handshake_vs_mtls", "peak_memory_vs_tensors", "invoke_uncommitted_vs_channel_rpc",
    }  # fmt: skip
    assert label("aes_gcm_tcp_1mib_vs_tls13") == "AES-GCM, TCP 1 MiB · against TLS 1.3"
    assert label("cpu_seconds_per_gb_tcp") == "CPU seconds per GB TCP"
    assert groups({"bytes": 3, "a_vs_b": 0}) == []


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="bench"):
        draw(BODY, str(tmp_path / "a.svg"), title="x")
