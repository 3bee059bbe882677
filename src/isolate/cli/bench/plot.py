"""Draw the figures of one benchmark run as an SVG that stands alone in a page (extra ``bench``: matplotlib).

Ratios (names with ``_vs_``) are bars from the line "as fast as the other", on a logarithmic axis, because half
and twice as much are the same distance. They stand in groups by what they are compared with; those of which less is
better come last. What is no ratio stands as text below.

    >>> label("tcp_1mib_vs_tls13")
    'TCP 1 MiB · against TLS 1.3'
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from isolate.errors import MissingExtra, StorageError

BETTER, WORSE, INK, FAINT, RULE = "#1b7f79", "#c8553d", "#22303c", "#7b8794", "#e3e8ec"
_WORDS = {
    "tls13": "TLS 1.3", "mtls": "mutual TLS", "plain": "plain sockets", "memcpy_ring": "a memcpy ring",
    "safetensors_clone": "safetensors", "safetensors_save": "safetensors",
}  # fmt: skip
_PLAINLY = {
    "tcp": "TCP", "unix": "Unix", "shm": "shared memory", "rtt": "round trip", "tls": "TLS", "gb": "GB",
    "cpu": "CPU", "ddp": "DDP", "gpu": "GPU", "ms": "(ms)",
}  # fmt: skip
# A figure with one of these in its name is a time or a cost: less is better.
_LESS_IS_BETTER = (
    "rtt", "handshake", "latency", "time", "overhead", "cpu", "seconds", "cost", "memory", "invoke",
)  # fmt: skip
_ROW, _HEADING = 0.36, 0.30  # inches

# A heading, or "" for none, and the ratios below it: name, text, value.
Group = tuple[str, list[tuple[str, str, float]]]


def _plainly(text: str) -> str:
    text = re.sub(r"(\d+)_?mib", r"\1 MiB", text.replace("aes_gcm", "AES-GCM,"))
    text = re.sub(r"(\d+)_?kib", r"\1 KiB", text)
    text = re.sub(r"(\d+)b(_|$)", r"\1 B\2", text).replace("_", " ")
    return " ".join(_PLAINLY.get(word, word) for word in text.split())


def _other(figure: str) -> str:
    theirs = figure.partition("_vs_")[2]
    return _WORDS.get(theirs, theirs.replace("_", " "))


def label(figure: str) -> str:
    """A figure's name as a person would say it."""
    ours = _plainly(figure.partition("_vs_")[0])
    return f"{ours} · against {_other(figure)}" if "_vs_" in figure else ours


def less_is_better(figure: str) -> bool:
    return any(word in figure for word in _LESS_IS_BETTER)


def better(figure: str, value: float) -> bool:
    """Whether the ratio says that ours is at least as good.

    >>> better("rtt_64b_vs_plain", 1.2), better("tcp_1mib_vs_plain", 1.2)
    (False, True)
    """
    return value <= 1 if less_is_better(figure) else value >= 1


def groups(figures: Mapping[str, float]) -> list[Group]:
    """The ratios in groups: what two or more are compared with, then the rest, then times and costs.

    >>> [heading for heading, _ in groups({"a_vs_x": 1, "b_vs_x": 2, "c_vs_y": 3, "rtt_vs_x": 1})]
    ['throughput against x', 'throughput against others', 'times and costs: less is better']
    """
    ratios = [name for name, value in figures.items() if "_vs_" in name and value > 0]
    more = [name for name in ratios if not less_is_better(name)]
    others = [_other(name) for name in more]
    shared = [one for one in dict.fromkeys(others) if others.count(one) > 1]
    found: list[Group] = []
    for other in shared:
        rows = [
            (name, _plainly(name.partition("_vs_")[0]), figures[name]) for name in more if _other(name) == other
        ]
        found.append((f"throughput against {other}", rows))
    rest = [(name, label(name), figures[name]) for name in more if _other(name) not in shared]
    if rest:
        found.append(("throughput against others" if shared else "throughput", rest))
    less = [(name, label(name), figures[name]) for name in ratios if less_is_better(name)]
    if less:
        found.append(("times and costs: less is better", less))
    return found


def draw(body: Mapping[str, Any], path: str, title: str) -> None:
    """Write the SVG for what ``bench --json`` writes. Raises MissingExtra or StorageError."""
    # By name, not by an import statement: the type checker runs where the extra is not installed.
    try:
        matplotlib: Any = import_module("matplotlib")
    except ImportError:
        raise MissingExtra("drawing needs matplotlib", hint="install isolate-confidential[bench]") from None
    matplotlib.use("svg")
    pyplot: Any = import_module("matplotlib.pyplot")

    figures: Mapping[str, float] = body["figures"]
    below = [(label(name), f"{value:,.4g}") for name, value in figures.items() if "_vs_" not in name]
    sections = groups(figures)
    size = sum(_HEADING + _ROW * len(rows) for _, rows in sections)
    foot = 0.25 + 0.21 * len(below)
    height = 1.05 + size + (0.35 if sections else -0.2) + foot
    style = {"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "isolate"}
    with matplotlib.rc_context(style):
        canvas, axis = pyplot.subplots(figsize=(9, height))
        canvas.patch.set_facecolor("white")
        longest = max([len(text) for _, rows in sections for _, text, _ in rows], default=20)
        canvas.subplots_adjust(
            left=0.05 + 0.0088 * longest,
            right=0.95,
            top=1 - 1.05 / height,
            bottom=(0.35 + foot) / height if sections else 0.01,
        )
        if sections:
            _bars(axis, sections, size)
        else:
            axis.set_visible(False)
        machine, rounds = body.get("machine", {}), body.get("rounds", "?")
        about = f"{machine.get('cpu', '')}, {machine.get('cores', '?')} cores · {rounds} paired round"
        about += "" if rounds == 1 else "s"
        top = 1 - 0.32 / height
        canvas.text(0.03, top, title, fontsize=14, fontweight="bold", color=INK, va="center")
        canvas.text(0.03, top - 0.28 / height, about, fontsize=9, color=FAINT, va="center")
        for place, word, colour in ((0.80, "better", BETTER), (0.89, "worse", WORSE)) if sections else ():
            canvas.text(place, top, "■", fontsize=11, color=colour, va="center", ha="right")
            canvas.text(place + 0.008, top, word, fontsize=9, color=INK, va="center")
        for row, (text, value) in enumerate(below):
            line = (foot - 0.12 - 0.21 * (row + 1)) / height
            canvas.text(0.03, line, text, fontsize=9, color=FAINT)
            canvas.text(0.05 + 0.0088 * longest, line, value, fontsize=9, color=INK)
        try:
            canvas.savefig(path, format="svg", metadata={"Date": None})
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from None
        finally:
            pyplot.close(canvas)


def _bars(axis: Any, sections: Sequence[Group], size: float) -> None:
    """The bars, downwards from 0; one unit of the axis is an inch."""
    ticker: Any = import_module("matplotlib.ticker")
    values = [value for _, rows in sections for *_, value in rows] or [1.0]
    axis.set_xscale("log", base=2)
    # Room for the number at the end of the longest bar.
    axis.set_xlim(min(0.5, *values, 1) / 1.6, max(2.0, *values, 1) * 1.6)
    axis.set_ylim(max(size, 0.5), 0)
    left = axis.get_yaxis_transform()
    where, ticks = 0.0, []
    for heading, rows in sections:
        if heading:
            axis.text(
                -0.012, where + _HEADING / 2 + 0.03, heading, transform=left, ha="right", va="center", color=FAINT,
                fontsize=9, fontstyle="italic",
            )  # fmt: skip
            if where:
                axis.axhline(where, color=RULE, linewidth=0.8, zorder=0)
        where += _HEADING
        for name, text, value in rows:
            middle = where + _ROW / 2
            colour, side = (BETTER if better(name, value) else WORSE), (1 if value >= 1 else -1)
            axis.barh(middle, value - 1, left=1, height=_ROW * 0.6, color=colour, zorder=2)
            axis.annotate(
                f"{value:.2f}", (value, middle), xytext=(6 * side, 0), textcoords="offset points",
                va="center_baseline", ha="left" if side > 0 else "right", color=INK, fontweight="bold",
            )  # fmt: skip
            ticks.append((middle, text))
            where += _ROW
    axis.axvline(1, color=INK, linewidth=1.2, zorder=3)
    axis.set_yticks([place for place, _ in ticks], [text for _, text in ticks], color=INK)
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: "the same" if x == 1 else f"{x:g} x"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.grid(axis="x", color=RULE, zorder=0)
    axis.tick_params(axis="both", length=0, colors=FAINT)
    axis.tick_params(axis="y", colors=INK)
    for side_name in ("top", "right", "left", "bottom"):
        axis.spines[side_name].set_visible(False)
