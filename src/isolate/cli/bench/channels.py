"""Channels against plain sockets by their best path, and against stdlib ssl with TLS 1.3, at the same sizes.

One process sends, another receives; every connection stays open all the time, and each round measures each once. A
throughput counts until the receiver says that it has all.

    >>> from isolate.cli.bench.channels import messages
    >>> messages(1 << 20, 64 << 20), messages(64, 64 << 20)
    (64, 20000)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from isolate.cli.bench import Figures, paired
from isolate.cli.bench.lines import opened

MIB = 1 << 20
ROUNDS = 15
SIZES = {"1mib": MIB}
KINDS = ["tcp", "plain_tcp", "tls_tcp", "unix", "plain_unix"]


def messages(size: int, volume: int) -> int:
    """How many messages make a measurable run: ``volume`` bytes, but at most 20,000 messages."""
    return max(1, min(volume // size, 20_000))


def run(rounds: int | None, quick: bool) -> tuple[int, Figures]:
    """The figures of the issue and of README.md: throughputs as ratios, higher is better."""
    turns = rounds or (3 if quick else ROUNDS)
    volume = (8 if quick else 96) * MIB
    with opened(KINDS) as bench:
        measures: dict[str, Callable[[], float]] = {}
        ratios: dict[str, tuple[str, str]] = {}
        for name, size in SIZES.items():
            for kind in KINDS:
                measures[f"{kind}_{name}"] = partial(bench.throughput, kind, size, messages(size, volume))
            ratios[f"tcp_{name}_vs_plain"] = (f"tcp_{name}", f"plain_tcp_{name}")
            ratios[f"tcp_{name}_vs_tls13"] = (f"tcp_{name}", f"tls_tcp_{name}")
            ratios[f"unix_{name}_vs_plain"] = (f"unix_{name}", f"plain_unix_{name}")
        for measure in measures.values():
            measure()
        return turns, paired(turns, measures, ratios)
