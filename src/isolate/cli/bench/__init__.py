"""`isolate bench NAME`: figures that are medians of ratios, paired in interleaved rounds of one run.

A shared machine drifts by a factor of two within a minute, so a ratio is taken only between two runs of the
same round, and the order of the two alternates from round to round.

    >>> figures = paired(3, {"ours": lambda: 2.0, "theirs": lambda: 1.0}, {"ours_vs_theirs": ("ours", "theirs")})
    >>> figures["ours_vs_theirs"]
    2.0
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import click

# Name -> module with `run(rounds: int | None, quick: bool) -> (rounds, figures)`.
BENCHMARKS: dict[str, str] = {
    "allreduce": "isolate.cli.bench.allreduce",
    "attestation": "isolate.cli.bench.attestation",
    "handles": "isolate.cli.bench.handles",
    "sealed": "isolate.cli.bench.sealed",
    "service": "isolate.cli.bench.service",
    "channels": "isolate.cli.bench.channels",
    "checkpoint": "isolate.cli.bench.checkpoint",
}

Figures = dict[str, float]


def paired(
    rounds: int, measures: Mapping[str, Callable[[], float]], ratios: Mapping[str, tuple[str, str]]
) -> Figures:
    """Run every measure once a round, in alternating order; answer the median of each ratio (first/second).

    A measure returns its own figure: a throughput in bytes per second, or a time in seconds.
    """
    seen: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            seen[name].append(measures[name]())
    return {
        figure: round(statistics.median(a / b for a, b in zip(seen[one], seen[two], strict=True)), 4)
        for figure, (one, two) in ratios.items()
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on, without anything that names the host."""
    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        model = platform.processor()
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system(), "kernel": platform.release()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("isolate-confidential", "cryptography", "pynacl", "numpy", "safetensors", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class _Benchmarks(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(BENCHMARKS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in BENCHMARKS:
            return None
        module = import_module(BENCHMARKS[name])

        @click.command(name, help=(module.__doc__ or "").split("\n\n")[0])
        @click.option("--rounds", type=click.IntRange(1, 1000), help="Interleaved rounds.")
        @click.option("--quick", is_flag=True, help="Small sizes and few rounds: shows that it runs.")
        @click.option("--json", "json_file", metavar="F", help="Write the figures as JSON (- is standard output).")
        @click.option("--plot", "plot_file", metavar="F.svg", help="Draw the figures (needs the extra 'bench').")
        def one(rounds: int | None, quick: bool, json_file: str | None, plot_file: str | None) -> None:
            done, figures = module.run(rounds, quick)
            body = {"machine": machine(), "versions": versions(), "rounds": done, "figures": figures}
            if json_file == "-":
                click.echo(json.dumps(body, indent=2))
            else:
                for figure, value in figures.items():
                    click.echo(f"{figure:<40} {value:g}")
                if json_file:
                    Path(json_file).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
            if plot_file:
                from isolate.cli.bench.plot import draw

                draw(body, plot_file, title=f"isolate bench {name}")

        return one


def command(name: str) -> click.Command:
    return _Benchmarks(name, help="Measure against plain tools, in paired rounds.")
