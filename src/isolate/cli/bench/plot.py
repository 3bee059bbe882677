"""Draw the figures of one benchmark run as an SVG that stands alone in a page (extra ``bench``: matplotlib).

Ratios (names with ``_vs_``) are bars from the line "as fast as the other", on a logarithmic axis, because half
and twice as much are the same distance. What is no ratio stands as a line of text below.

    >>> label("tcp_1mib_vs_tls13")
    'TCP 1 MiB · against TLS 1.3'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from isolate.errors import MissingExtra, StorageError

BETTER, WORSE, INK, FAINT = "#1b7f79", "#c8553d", "#22303c", "#8a97a3"
_WORDS = {"tls13": "TLS 1.3", "mtls": "mutual TLS", "plain": "plain", "memcpy_ring": "a memcpy ring", "gcm": "GCM"}
_PLAINLY = {"tcp": "TCP", "unix": "Unix", "shm": "shared memory", "rtt": "round trip", "tls": "TLS", "gb": "GB"}
# A figure with one of these in its name is a time or a cost: less is better.
_LESS_IS_BETTER = ("rtt", "handshake", "latency", "time", "overhead", "cpu", "seconds", "cost")


def label(figure: str) -> str:
    """A figure's name as a person would say it."""
    ours, _, theirs = figure.partition("_vs_")
    text = re.sub(r"(\d+)_?mib", r"\1 MiB", ours.replace("aes_gcm", "AES-GCM"))
    text = re.sub(r"(\d+)_?kib", r"\1 KiB", text)
    text = re.sub(r"(\d+)b\b", r"\1 B", text).replace("_", " ")
    text = " ".join(_PLAINLY.get(word, word) for word in text.split())
    return f"{text} · against {_WORDS.get(theirs, theirs.replace('_', ' '))}" if theirs else text


def better(figure: str, value: float) -> bool:
    """Whether the ratio says that ours is at least as good.

    >>> better("rtt_64b_vs_plain", 1.2), better("tcp_1mib_vs_plain", 1.2)
    (False, True)
    """
    less = any(word in figure for word in _LESS_IS_BETTER)
    return value <= 1 if less else value >= 1


def draw(body: Mapping[str, Any], path: str, title: str) -> None:
    """Write the SVG for what ``bench --json`` writes. Raises MissingExtra or StorageError."""
    # By name, not by an import statement: the type checker runs where the extra is not installed.
    try:
        matplotlib: Any = import_module("matplotlib")
    except ImportError:
        raise MissingExtra("drawing needs matplotlib", hint="install isolate-confidential[bench]") from None
    matplotlib.use("svg")
    pyplot: Any = import_module("matplotlib.pyplot")
    ticker: Any = import_module("matplotlib.ticker")

    figures: Mapping[str, float] = body["figures"]
    ratios = [(name, float(value)) for name, value in figures.items() if "_vs_" in name and value > 0]
    others = [f"{label(name)}: {value:,.4g}" for name, value in figures.items() if "_vs_" not in name]
    rows = max(len(ratios), 1)
    height = 1.5 + 0.46 * rows + 0.22 * len(others)
    style = {"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "isolate"}
    with matplotlib.rc_context(style):
        canvas, axis = pyplot.subplots(figsize=(9, height))
        bottom = (0.55 + 0.22 * len(others)) / height
        left = 0.05 + 0.0086 * max([len(label(name)) for name, _ in ratios], default=20)
        canvas.subplots_adjust(left=left, right=0.93, top=1 - 0.85 / height, bottom=bottom)
        axis.set_xscale("log", base=2)
        values = [value for _, value in ratios] or [1.0]
        axis.set_xlim(min(0.5, *values, 1) / 1.45, max(2.0, *values, 1) * 1.45)
        axis.set_ylim(rows - 0.4, -0.6)
        for row, (name, value) in enumerate(ratios):
            colour = BETTER if better(name, value) else WORSE
            axis.barh(row, value - 1, left=1, height=0.54, color=colour, zorder=2)
            side = 1 if value >= 1 else -1
            axis.annotate(
                f"{value:.2f}", (value, row), xytext=(6 * side, 0), textcoords="offset points", va="center",
                ha="left" if side > 0 else "right", color=INK, fontweight="bold",
            )  # fmt: skip
        axis.axvline(1, color=INK, linewidth=1.2, zorder=3)
        axis.set_yticks(range(len(ratios)), [label(name) for name, _ in ratios], color=INK)
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g} x"))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.grid(axis="x", color="#e3e8ec", zorder=0)
        axis.tick_params(axis="both", length=0, colors=FAINT)
        axis.tick_params(axis="y", colors=INK)
        for side_name in ("top", "right", "left", "bottom"):
            axis.spines[side_name].set_visible(False)
        machine = body.get("machine", {})
        about = (
            f"{machine.get('cpu', '')}, {machine.get('cores', '?')} cores · {body.get('rounds', '?')} paired rounds"
        )
        canvas.text(0.03, 1 - 0.32 / height, title, fontsize=14, fontweight="bold", color=INK, va="center")
        canvas.text(0.97, 1 - 0.60 / height, "better", fontsize=9, color=BETTER, va="center", ha="right")
        canvas.text(0.91, 1 - 0.60 / height, "worse", fontsize=9, color=WORSE, va="center", ha="right")
        canvas.text(0.03, 1 - 0.60 / height, about, fontsize=9, color=FAINT, va="center")
        for row, line in enumerate(others):
            canvas.text(0.03, (0.22 * (len(others) - row) - 0.08) / height, line, fontsize=9, color=FAINT)
        try:
            canvas.savefig(path, format="svg", metadata={"Date": None})
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from None
        finally:
            pyplot.close(canvas)
