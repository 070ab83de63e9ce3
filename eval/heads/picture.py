"""The picture of a head report: four maps of layers and heads, the heads that keep everything marked."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kvx.eval.heads.report import HeadReport, Numbers

_MARK = "#d1495b"


def head_map_png(report: "HeadReport") -> bytes:
    """PNG of induction and echo scores by KV head, and of where attention goes by query head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    beyond = tuple(tuple(1 - share for share in layer) for layer in report.local)
    maps: list[tuple[str, Numbers, str, float | None]] = [
        ("Induction score", report.induction, "KV head", None),
        ("Echo score", report.echo, "KV head", None),
        ("Attention beyond\nfirst and newest", beyond, "query head", 1.0),
        ("Attention on\nthe first tokens", report.first, "query head", 1.0),
    ]
    widths = [max(map(len, numbers)) + 4 for _, numbers, _, _ in maps]
    figure = Figure(figsize=(12, 1.8 + 0.2 * max(len(report.induction), 12)), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(maps), gridspec_kw={"width_ratios": widths})
    for index, (axes, (title, numbers, heads, top)) in enumerate(zip(panels, maps, strict=True)):
        shown = axes.imshow(rectangle(numbers), aspect="auto", cmap="Blues", vmin=0, vmax=top, interpolation="none")
        axes.set(title=title, xlabel=heads)
        axes.set_xticks(range(0, max(map(len, numbers)), 1 + max(map(len, numbers)) // 12))
        figure.colorbar(shown, ax=axes, location="bottom", shrink=0.9)
        _mark(axes, report, numbers)
        if index == 0:
            axes.set_ylabel("layer")
        else:
            axes.tick_params(labelleft=False)
    settings = report.settings
    figure.suptitle(
        f"{report.model}: {len(report.heads)} KV heads keep everything (red), chosen by {report.by}; "
        f"first {settings['sinks']}, newest {settings['recent']} of {settings['tokens']} tokens",
        fontsize=11,
    )
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def rectangle(numbers: "Numbers") -> np.ndarray:
    """(layers, heads), nan where a layer has fewer heads than another."""
    found = np.full((len(numbers), max(map(len, numbers))), np.nan)
    for layer, heads in enumerate(numbers):
        found[layer, : len(heads)] = heads
    return found


def _mark(axes: Any, report: "HeadReport", numbers: "Numbers") -> None:
    """A frame around each chosen KV head, or around the query heads that read it."""
    from matplotlib.patches import Rectangle

    for layer, head in report.heads:
        group = len(numbers[layer]) // len(report.induction[layer])
        axes.add_patch(
            Rectangle((head * group - 0.5, layer - 0.5), group, 1, fill=False, edgecolor=_MARK, linewidth=1.4)
        )
