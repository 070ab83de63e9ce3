"""The picture of a plan: how many users' caches fit beside the weights, against the length of their prompts."""

import io
from collections.abc import Sequence
from pathlib import Path

from kvx.destinations import check_file
from kvx.errors import BadInput
from kvx.eval.plan.planning import Planner
from kvx.eval.plan.roofline import users
from kvx.policy import Policy

SHORTEST = 512


def checked_png(path: Path) -> Path:
    """Where the picture goes; refused before any work if it cannot.

    Raises:
        BadInput: not a .png, or a folder that does not exist.
    """
    if path.suffix.lower() != ".png":
        raise BadInput(f"out={str(path)!r}; allowed: a .png file in a folder that exists")
    check_file(path, "out")
    return path


def largest_batches(planner: Planner, policy: Policy) -> list[tuple[int, int]]:
    """(tokens of a prompt, largest batch), at powers of two from `SHORTEST` on, as far as the model goes."""
    lengths, length = [], SHORTEST
    while length <= planner.longest:
        lengths.append(length)
        length *= 2
    return [(each, users(planner.load(policy, each), planner.job.machine)) for each in lengths or [planner.longest]]


def batches_png(planner: Planner, policies: Sequence[Policy]) -> bytes:
    """PNG: a line for each policy, both axes logarithmic; a policy's line ends where not even one cache fits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for policy in policies:
        points = [(length, batch) for length, batch in largest_batches(planner, policy) if batch]
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker="o", markersize=3.5, label=policy.text)
    machine = planner.job.machine
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axhline(planner.job.batch, color="0.6", linewidth=0.8, linestyle=":")
    axes.axvline(planner.context, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(
        title=f"{planner.job.model} on {machine.chips} x {machine.chip.name}: caches that fit beside the weights",
        xlabel="tokens of every prompt",
        ylabel="largest batch",
    )
    axes.grid(True, color="0.93", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()
