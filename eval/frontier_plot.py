"""The picture of a comparison: quality against the cache's share of a bfloat16 full cache, with the Pareto frontier."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from kvx.eval.comparison import Results

Point = tuple[float, float, str]

_BEST, _OTHER = "#1f4e9c", "#a8b3c2"


def frontier_png(results: "Results") -> bytes:
    """PNG of two panels: perplexity (lower is better) and passkey accuracy (higher is better) against bytes.

    Each panel's horizontal axis is the share of its own workload, since a budget in slots is a larger share of a short
    prompt than of a long one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    perplexity = [(row.perplexity_share_of_bf16, row.perplexity, row.policy) for row in results.policies]
    work = results.workload
    best_left = _panel(left, perplexity, lower_is_better=True)
    left.set(
        title="Perplexity of held-out prose",
        ylabel="perplexity (lower is better)",
        xlabel=f"cache bytes, share of a bf16 full cache, {work['prompt'] + work['forced']} tokens",
    )
    passkey = [(row.share_of_bf16, 50 * (row.agnostic + row.aware), row.policy) for row in results.policies]
    best_right = _panel(right, passkey, lower_is_better=False)
    right.set(
        title="Passkeys found, question after and before compression",
        ylabel="accuracy in % (higher is better)",
        xlabel=f"cache bytes, share of a bf16 full cache, {work['longest']} tokens",
        ylim=(-6, 112),
    )
    figure.suptitle(f"{results.model}: quality against bytes; dark: nothing is better in both", fontsize=13)
    # Titles and limits move points on the page, so names come last.
    figure.draw_without_rendering()
    _labels(left, perplexity, best_left)
    _labels(right, passkey, best_right)
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


def _panel(axes: Any, points: Sequence[Point], lower_is_better: bool) -> list[Point]:
    edge = frontier(points, lower_is_better)
    axes.plot(
        [point[0] for point in edge], [point[1] for point in edge],
        color=_BEST, alpha=0.45, drawstyle="steps-post", linewidth=1.6, zorder=1,
    )  # fmt: skip
    for point in points:
        axes.scatter(*point[:2], color=_BEST if point in edge else _OTHER, s=46, zorder=3, edgecolor="white")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.xaxis.set_minor_formatter(lambda share, _: f"{100 * share:g} %" if f"{share:.0e}"[0] in "235" else "")
    axes.grid(True, which="both", color="0.94", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    values = [point[1] for point in points]
    if lower_is_better and max(values) > 1.5 * min(values):
        # A policy that fails would otherwise press all others into one line.
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.12, y=0.12)
    return edge


def _labels(axes: Any, points: Sequence[Point], edge: Sequence[Point]) -> None:
    """A name beside every point: of some places around it the first that covers nothing, else the least covering."""
    pixel = axes.figure.dpi / 72
    spots = {point: (axes.transData.transform(point[:2]) / pixel).tolist() for point in points}
    frame = axes.bbox
    inside = _Box(frame.x0 / pixel, frame.y0 / pixel, frame.x1 / pixel, frame.y1 / pixel)
    taken = [_Box(x - 4, y - 4, x + 4, y + 4) for x, y in spots.values()]
    # Points in a crowd choose first.
    crowd = {
        point: sum(abs(x - u) < 90 and abs(y - v) < 30 for u, v in spots.values()) for point, (x, y) in spots.items()
    }
    for point in sorted(points, key=lambda point: -crowd[point]):
        x, y = spots[point]
        width, height = 4.5 * len(point[2]), 9.5
        boxes = [
            _Box.around(x + dx * reach + dx * width / 2, y + dy * reach, width, height)
            for reach in (9, 15, 23, 33, 45, 60, 80, 100)
            for dx, dy in ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1))
        ]
        costs = [sum(box.overlap(other) for other in taken) + 4 * box.outside(inside) for box in boxes]
        box = boxes[costs.index(min(costs))]
        taken.append(box)
        middle = ((box.left + box.right) / 2, (box.low + box.high) / 2)
        far = abs(middle[1] - y) > 12 or abs(middle[0] - x) > width / 2 + 14
        axes.annotate(
            point[2], point[:2], xytext=(middle[0] - x, middle[1] - y), textcoords="offset points",
            ha="center", va="center", fontsize=8, color=_BEST if point in edge else "0.25", zorder=4,
            arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.6, "shrinkB": 3} if far else None,
        )  # fmt: skip


class _Box(NamedTuple):
    """A rectangle in points."""

    left: float
    low: float
    right: float
    high: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> "_Box":
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    def overlap(self, other: "_Box") -> float:
        """The area they share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.high, other.high) - max(self.low, other.low)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, frame: "_Box") -> float:
        """The area beyond the frame."""
        return (self.right - self.left) * (self.high - self.low) - self.overlap(frame)
