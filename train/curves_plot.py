"""The picture of learning curves: held-out perplexity against tokens, a colour a start, paler from a second seed on."""

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

    figure = Figure(figsize=(7, 4.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    starts = list(dict.fromkeys(line["start"] for line in lines))
    for start, seed in dict.fromkeys((line["start"], line["seed"]) for line in lines):
        own = [line for line in lines if (line["start"], line["seed"]) == (start, seed)]
        first = seed == next(line["seed"] for line in lines if line["start"] == start)
        axes.plot(
            [line["tokens"] for line in own],
            [line["perplexity"] for line in own],
            color=f"C{starts.index(start)}",
            marker="o",
            markersize=3,
            alpha=1.0 if first else 0.45,
            label=start if first else None,
        )
    teachers = [line["teacher_perplexity"] for line in lines if "teacher_perplexity" in line]
    if teachers:
        axes.axhline(teachers[0], color="black", linestyle="--", linewidth=1, label="teacher")
    axes.set(xlabel="tokens", ylabel="held-out perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
