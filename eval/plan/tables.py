"""A plan's figures as a table for the terminal, as JSON, and the formula of each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import jax.numpy as jnp
from rich.table import Table

from kvx.eval.plan.check import Checked
from kvx.eval.plan.chips import Chip
from kvx.eval.plan.planning import Job, Plan
from kvx.eval.plan.roofline import SYMBOLS

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Figure(NamedTuple):
    """One row.

    Attributes:
        label: what the table shows.
        fields: of a plan, that the formula is about.
        formula: how they come about.
        shown: the row's entry for a plan.
    """

    label: str
    fields: tuple[str, ...]
    formula: str
    shown: Callable[[Plan], str]


FIGURES = (
    Figure(
        "cache", ("cache", "host", "bound"),
        "sum of the arrays that kvx.prefill makes of S tokens, u rows and room for R a more, built as shapes",
        lambda plan: _at_most(plan.bound) + size(plan.cache) + (f", {size(plan.host)} on host" if plan.host else ""),
    ),
    Figure("  of the full cache", ("share",), "cache / the full cache's", lambda plan: f"{100 * plan.share:.1f} %"),
    Figure(
        "  metadata", ("metadata",), "arrays of it that are neither keys nor values nor codes of them",
        lambda plan: size(plan.metadata),
    ),
    Figure(
        "read a step", ("read",), "sum over layers of what a step reads of their stores; all, where the data decide",
        lambda plan: _at_most(plan.read is None) + size(plan.cache - plan.host if plan.read is None else plan.read),
    ),
    Figure(
        "weights on a chip", ("weights",), "W: parameters, and what the policy learned",
        lambda plan: size(plan.weights),
    ),
    Figure(
        "cache on a chip", ("resident", "fits"),
        "C(u), split over N chips where N divides the KV heads; fits if W + C(u) <= M",
        lambda plan: size(plan.resident) + ("" if plan.fits else ", does not fit"),
    ),
    Figure(
        "prefill peak on a chip", ("peak", "prefill_fits"),
        "W + the most bytes alive between the prefill's programs, scratch within them not counted",
        lambda plan: size(plan.peak) + ("" if plan.prefill_fits else ", does not fit"),
    ),
    Figure(
        "largest batch", ("largest_batch",), "U = the largest u with W + C(u) <= M",
        lambda plan: f"{plan.largest_batch}",
    ),
    Figure(
        "largest context", ("largest_context", "limited"),
        "the longest prompt with W + C(u) <= M, in the steps that prompts are padded to",
        lambda plan: f"{plan.largest_context}" + (", the model's limit" if plan.limited else ""),
    ),
    Figure(
        "prefill", ("prefill_seconds",), "T_pre = max(u FLOP(S) / (N F), W_read / BW)",
        lambda plan: duration(plan.prefill_seconds),
    ),
    Figure(
        "one step", ("step_seconds",), "T_step = max((W_read + r C(u)) / BW, u FLOP(1) / (N F))",
        lambda plan: _at_most(plan.read is None) + duration(plan.step_seconds),
    ),
    Figure(
        "tokens a second", ("tokens_per_second",), "u / T_step",
        lambda plan: ("at least " if plan.read is None else "") + f"{plan.tokens_per_second:.0f}",
    ),
    Figure("context switch", ("switch_seconds",), "T_sw = 2 KV / X", lambda plan: duration(plan.switch_seconds)),
    Figure(
        "sessions an hour", ("sessions_per_hour",),
        "3600 V / (V T_pre + R ceil(V / u) a T_step(u) [+ R V min(T_sw, T_pre) if V > U]), u = min(U, V)",
        lambda plan: f"{plan.sessions_per_hour:.0f}",
    ),
)  # fmt: skip
"""In the order of the table."""

OPERATIONS = {
    "FLOP(S)": "sum over layers of 2 P s + H (D + V) s^2, + 2 N E once; s = S, or what the policy lets go on; causal",
    "FLOP(1)": "2 (P + N E): P entries of the layers' matrices, N token ids, width E",
}
"""Of the operations that times are made of."""


def plan_table(job: Job, plans: Sequence[Plan]) -> Table:
    """Figures by policy."""
    chip, chips = job.machine.chip, job.machine.chips
    title = (
        f"{job.model} in {jnp.dtype(job.dtype).name} on {chips} x {chip.name}: "
        f"{job.batch} x {job.context} tokens, {job.rounds} x {job.answer} to answer, {job.users or job.batch} users"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for plan in plans:
        table.add_column(plan.policy, justify="right", overflow="fold")
    for figure in FIGURES:
        table.add_row(figure.label, *(figure.shown(plan) for plan in plans))
    return table


def formula_table(job: Job) -> Table:
    """How each figure comes about, and the chip's own."""
    table = Table(title="formulas", title_justify="left")
    table.add_column("figure")
    table.add_column("formula", overflow="fold")
    for figure in FIGURES:
        table.add_row(figure.label.strip(), figure.formula)
    for name, formula in OPERATIONS.items():
        table.add_row(name, formula)
    for name, meaning in SYMBOLS.items():
        table.add_row(name, meaning)
    table.add_row(f"one {job.machine.chip.name}", _peaks(job.machine.chip))
    return table


def check_table(checks: Sequence[Checked]) -> Table:
    """The compiler's words beside the plan's."""
    table = Table(title=f"the TPU compiler for {checks[0].topology}, on a chip", title_justify="left")
    table.add_column("")
    for each in checks:
        table.add_column(each.policy, justify="right", overflow="fold")
    table.add_row("weights and cache, planned", *(size(each.predicted) for each in checks))
    table.add_row("a step's arguments, compiled", *(_known(each, size(each.arguments)) for each in checks))
    table.add_row("  error of the plan", *(_known(each, f"{100 * each.error:+.2f} %") for each in checks))
    table.add_row("a step's temporaries", *(_known(each, size(each.temporaries)) for each in checks))
    table.add_row("prefill peak, with scratch", *(_peak(each) for each in checks))
    table.add_row("compiled in", *(f"{each.seconds:.0f} s" for each in checks))
    return table


def _known(checked: Checked, figure: str) -> str:
    return figure if checked.refusal is None else f"does not fit: {checked.refusal}"


def _peak(checked: Checked) -> str:
    return "not compiled" if checked.prefill_peak is None else size(checked.prefill_peak)


def as_json(job: Job, plans: Sequence[Plan], checks: Sequence[Checked]) -> dict[str, Any]:
    """Everything, with the formula of every field."""
    chip = job.machine.chip
    return {
        "model": job.model, "dtype": jnp.dtype(job.dtype).name, "chip": asdict(chip), "chips": job.machine.chips,
        "ridge": chip.ridge, "context": job.context, "batch": job.batch, "answer": job.answer, "rounds": job.rounds,
        "users": job.users or job.batch,
        "policies": [asdict(plan) for plan in plans],
        "checks": [each.as_json() for each in checks],
        "formulas": {name: figure.formula for figure in FIGURES for name in figure.fields} | OPERATIONS,
        "symbols": SYMBOLS,
    }  # fmt: skip


def size(count: int) -> str:
    """Bytes in the unit that leaves a number below 1024."""
    power = min(int(math.log(count, 1024)), len(UNITS) - 1) if count >= 1 else 0
    return f"{count / 1024**power:.{2 if power else 0}f} {UNITS[power]}"


def duration(seconds: float) -> str:
    """In seconds, milliseconds or microseconds."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("the last unit takes all")


def _at_most(bound: bool) -> str:
    return "at most " if bound else ""


def _peaks(chip: Chip) -> str:
    return (
        f"F = {chip.flops / 1e12:g} TFLOP/s (bfloat16), M = {size(chip.memory)}, BW = {chip.bandwidth / 1e9:g} GB/s, "
        f"X = {chip.link / 1e9:g} GB/s; products with weights are bound by arithmetic beyond {chip.ridge:.0f} tokens"
    )
