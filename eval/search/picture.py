"""The picture of a search: quality against bytes a token, every policy that was run, and the frontier numbered."""

import io

from kvx.eval.job import FULL
from kvx.eval.search.loop import Found

_BEST, _OTHER = "#1f4e9c", "#a8b3c2"


def frontier_png(found: Found, title: str, quality: str) -> bytes:
    """PNG. A point is the larger, the more samples it saw; names of the frontier stand beside, not on, the points.

    Args:
        title: above it.
        quality: the vertical axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    edge = found.frontier
    names = {point.name for point in edge}
    for text in found.run:
        if text not in names:
            scores = found.scores[text]
            size = 12 + 40 * len(scores) / found.counts[-1]
            axes.scatter(
                found.nbytes(text), sum(scores) / len(scores), color=_OTHER, s=size, zorder=2, edgecolor="white"
            )
    axes.plot(
        [point.nbytes for point in edge], [point.quality for point in edge],
        color=_BEST, alpha=0.45, drawstyle="steps-post", linewidth=1.6, zorder=1,
    )  # fmt: skip
    for number, point in enumerate(edge, 1):
        label = f"{number}  {point.name}"
        axes.scatter(point.nbytes, point.quality, color=_BEST, s=52, zorder=3, edgecolor="white", label=label)
        axes.annotate(
            str(number), (point.nbytes, point.quality), xytext=(0, 6), textcoords="offset points",
            ha="center", fontsize=9, color=_BEST, zorder=4,
        )  # fmt: skip
    axes.axvline(found.limit, color="#b5482a", linewidth=1, linestyle="--", label=f"limit, {found.limit:g}")
    if scores := found.scores.get(FULL):
        full = sum(scores) / len(scores)
        axes.axhline(full, color="0.4", linewidth=1, linestyle=":", label=f"full cache, {found.sized[FULL]:.0f}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:.0f}")
    # A dollar sign would begin a formula.
    axes.set(
        title=title.replace("$", r"\$"), xlabel="resident bytes of the cache a token of the prompt", ylabel=quality
    )
    axes.grid(True, color="0.94", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.12)
    figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()
