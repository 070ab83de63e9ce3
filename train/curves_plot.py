"""The picture of learning curves: perplexity and passkeys against tokens, a colour a start, later seeds paler."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG.

    Args:
        lines: evaluations, as `curves.jsonl` holds them.
        path: of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    starts = list(dict.fromkeys(line["start"] for line in lines))
    asked = [line for line in lines if "passkey" in line]
    heights = [3, 1] if asked else [1]
    figure = Figure(figsize=(7, 1.5 + sum(heights)), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    upper, *below = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw(upper, lines, "perplexity", starts)
    upper.set(ylabel="held-out perplexity", yscale="log")
    upper.yaxis.set_major_formatter("{x:g}")
    low, high = upper.get_ylim()
    named = "25" if high > 20 * low else "23456789"  # more would lie upon each other
    upper.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in named else "")
    upper.legend(frameon=False, fontsize=8)
    for axes in below:
        _draw(axes, asked, "passkey", starts)
        axes.set(ylabel="passkeys", ylim=(-0.05, 1.05))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    lowest = (upper, *below)[-1]
    lowest.set(xlabel="tokens")
    lowest.xaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(path)


def _draw(axes: Any, lines: Sequence[Mapping[str, Any]], name: str, starts: Sequence[str]) -> None:
    """A number of every start, and of the teacher."""
    for start, seed in dict.fromkeys((line["start"], line["seed"]) for line in lines):
        own = [line for line in lines if (line["start"], line["seed"]) == (start, seed)]
        first = seed == next(line["seed"] for line in lines if line["start"] == start)
        axes.plot(
            [line["tokens"] for line in own],
            [line[name] for line in own],
            color=f"C{starts.index(start)}",
            marker="o",
            markersize=3,
            alpha=1.0 if first else 0.45,
            label=start if first else None,
        )
    teachers = [line[f"teacher_{name}"] for line in lines if f"teacher_{name}" in line]
    if teachers:
        axes.axhline(teachers[0], color="black", linestyle="--", linewidth=1, label="teacher")
    axes.grid(alpha=0.3, which="both")
