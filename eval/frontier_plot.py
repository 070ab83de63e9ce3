"""The picture of a comparison: quality against the cache's share of a bfloat16 full cache, with the Pareto frontier."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvx.eval.results import Results

Point = tuple[float, float, str]

_COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#9c6b4e", "#97bbf5", "#efb118", "#6cc5b0")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def frontier_png(results: "Results") -> bytes:
    """PNG of two panels: perplexity (lower is better) and passkey accuracy (higher is better) against bytes.

    Each panel's horizontal axis is the share of its own workload, since a budget in slots is a larger share of a short
    prompt than of a long one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 6.4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = [row.policy for row in results.policies]
    style = {
        name: (_COLOURS[index % len(_COLOURS)], _MARKERS[(index // len(_COLOURS) + index) % len(_MARKERS)])
        for index, name in enumerate(names)
    }
    perplexity = [(row.perplexity_share_of_bf16, row.perplexity, row.policy) for row in results.policies]
    work = results.workload
    _panel(left, perplexity, style, lower_is_better=True)
    left.set(
        title="Perplexity of held-out prose",
        ylabel="perplexity (lower is better)",
        xlabel=f"cache bytes, share of a bf16 full cache, {work['prompt'] + work['forced']} tokens",
    )
    passkey = [(row.share_of_bf16, 50 * (row.agnostic + row.aware), row.policy) for row in results.policies]
    _panel(right, passkey, style, lower_is_better=False)
    right.set(
        title="Passkeys found, question after and before compression",
        ylabel="accuracy in % (higher is better)",
        xlabel=f"cache bytes, share of a bf16 full cache, {work['longest']} tokens",
        ylim=(-6, 112),
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(handles)), frameon=False, fontsize=9)
    figure.suptitle(f"{results.model}: quality against bytes", fontsize=13)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def frontier(points: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """The points that no other beats in both bytes and quality, by rising bytes."""
    sign = 1.0 if lower_is_better else -1.0
    best, kept = float("inf"), []
    for point in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if sign * point[1] < best:
            best = sign * point[1]
            kept.append(point)
    return kept


def _panel(axes, points: Sequence[Point], style: dict[str, tuple[str, str]], lower_is_better: bool) -> None:
    edge = frontier(points, lower_is_better)
    axes.plot(
        [point[0] for point in edge], [point[1] for point in edge],
        color="0.6", drawstyle="steps-post", linewidth=1.4, zorder=1, label="frontier",
    )  # fmt: skip
    for share, value, name in points:
        colour, marker = style[name]
        axes.scatter(share, value, color=colour, marker=marker, s=58, zorder=3, label=name, edgecolor="white",
                     linewidth=0.6)  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.xaxis.set_minor_formatter(lambda share, _: f"{100 * share:g}" if f"{share:.0e}"[0] in "235" else "")
    axes.grid(True, which="both", color="0.92", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if lower_is_better and max(point[1] for point in points) > 2.5 * min(point[1] for point in points):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    _labels(axes, points)


def _labels(axes, points: Sequence[Point]) -> None:
    """A name beside every point, pushed apart vertically where points crowd."""
    axes.margins(x=0.16, y=0.1)
    axes.figure.canvas.draw()
    height = 11.0 * axes.figure.dpi / 72
    width = 150.0 * axes.figure.dpi / 140
    placed: list[tuple[float, float]] = []
    middle = sum(axes.transAxes.transform([(0, 0), (1, 0)])[:, 0]) / 2
    for share, value, name in sorted(points, key=lambda point: (point[1], point[0])):
        x, y = axes.transData.transform((share, value))
        spot = y
        while any(abs(x - other) < width and abs(spot - taken) < height for other, taken in placed):
            spot += height / 4
        placed.append((x, spot))
        left = x > middle + 0.25 * middle
        axes.annotate(
            _short(name), (share, value), xytext=((-8 if left else 8), (spot - y) * 72 / axes.figure.dpi),
            textcoords="offset points", ha="right" if left else "left", va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "0.8", "linewidth": 0.6} if spot - y > height / 2 else None,
        )  # fmt: skip


def _short(name: str) -> str:
    """Without parameter names, which the legend gives in full."""
    return name.replace("budget=", "").replace("bits=", "").replace("high=", "")
