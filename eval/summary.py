"""The table of an evaluation: a row a cell and policy, with intervals, and paired differences from the full cache."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from kvx.eval.job import FULL
from kvx.eval.records import Cell, Record
from kvx.eval.statistics import Interval

FIDELITY = "fidelity"
"""The task whose score is a divergence: 0 is best, and there is no upper bound."""


@dataclass(frozen=True)
class Row:
    """One policy in one cell.

    Attributes:
        cell, policy: which.
        score: mean over the samples.
        share: resident bytes as a share of a bfloat16 full cache's, mean over the samples.
        cache_bytes, bytes_read: of one sample, resident and touched in a decode step, means.
        policy_bytes: of the policy's learned arrays.
        retention: share of the evidence's tokens that were kept; None where there is none.
        difference: score less the full cache's, paired by sample; None for the full cache itself.
        lower_is_better: of the score.
        measures: means of further numbers.
    """

    cell: Cell
    policy: str
    score: Interval
    share: float
    cache_bytes: int
    bytes_read: int
    policy_bytes: int
    retention: float | None
    difference: Interval | None
    lower_is_better: bool
    measures: dict[str, Interval]


def summary(records: Sequence[Record]) -> list[Row]:
    """One row for each cell and policy: cells in the order of their names, in each the full cache first, then by bytes.

    The order of the records does not matter, so an interrupted evaluation ends in the same table.
    """
    groups: dict[tuple[Cell, str], dict[int, Record]] = {}
    for record in records:
        groups.setdefault((record.cell, record.policy), {})[record.index] = record
    rows = [_row(cell, policy, found, groups.get((cell, FULL), {})) for (cell, policy), found in groups.items()]
    return sorted(rows, key=lambda row: (*_order(row.cell), row.policy != FULL, -row.share, row.policy))


def table(rows: Sequence[Row]) -> Table:
    """As shown in a terminal."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "task", "length", "mode", "policy"):
        shown.add_column(column, no_wrap=True)
    for column in ("score (95 %)", "samples", "minus full (paired)", "of bf16", "KiB", "read KiB", "evidence kept"):
        shown.add_column(column, justify="right", no_wrap=True)
    before = None
    for row in rows:
        cell = row.cell
        named = ("", "", "", "") if cell == before else (cell.model, cell.task, str(cell.length), cell.mode)
        before = cell
        shown.add_row(
            *named,
            row.policy,
            _interval(row.score),
            str(row.score.count),
            "" if row.difference is None else _interval(row.difference),
            f"{row.share:.1%}",
            f"{row.cache_bytes / 1024:.0f}",
            f"{row.bytes_read / 1024:.0f}",
            "" if row.retention is None else f"{row.retention:.0%}",
        )
    return shown


def as_csv(rows: Sequence[Row]) -> str:
    """The same for a spreadsheet, measures included."""
    measures = sorted({name for row in rows for name in row.measures})
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    ends = ("", "_low", "_high")
    writer.writerow(
        ["model", "task", "length", "mode", "policy", *(f"score{end}" for end in ends), "samples",
         *(f"difference{end}" for end in ends), "share_of_bf16", "cache_bytes", "bytes_read", "policy_bytes",
         "retention", *(f"{name}{end}" for name in measures for end in ends)]
    )  # fmt: skip
    for row in rows:
        cell = row.cell
        writer.writerow(
            [cell.model, cell.task, cell.length, cell.mode, row.policy, *_numbers(row.score), row.score.count,
             *_numbers(row.difference), _number(row.share), row.cache_bytes, row.bytes_read, row.policy_bytes,
             _number(row.retention), *(each for name in measures for each in _numbers(row.measures.get(name)))]
        )  # fmt: skip
    return target.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """For a RESULTS file: a table a model and length, a line a policy, a column a task and mode."""
    parts = []
    for (model, length), group in _grouped(rows, lambda row: (row.cell.model, row.cell.length)).items():
        found = {(row.cell, row.policy): row for row in group}
        cells = sorted({row.cell for row in group}, key=_order)
        policies = list(
            dict.fromkeys(row.policy for row in sorted(group, key=lambda row: (row.policy != FULL, -row.share)))
        )
        heads = [_told(cell, found[cell, FULL].score.count if (cell, FULL) in found else 0) for cell in cells]
        lines = [
            f"{model}, {length} tokens:",
            "",
            "| " + " | ".join(["policy", "stored, of bf16", "read, of bf16", *heads]) + " |",
            "| " + " | ".join(["---"] * (3 + len(heads))) + " |",
        ]
        for policy in policies:
            some = next(found[cell, policy] for cell in cells if (cell, policy) in found)
            whole = some.cache_bytes / some.share if some.share else math.nan
            scores = [_score(found.get((cell, policy))) for cell in cells]
            lines.append(
                "| " + " | ".join([policy, f"{some.share:.1%}", f"{some.bytes_read / whole:.1%}", *scores]) + " |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _told(cell: Cell, count: int) -> str:
    named = cell.task if cell.task == FIDELITY else f"{cell.task}, {cell.mode}"
    return f"{named} (n = {count})"


def _score(row: Row | None) -> str:
    return "" if row is None else _interval(row.score)


def _grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _row(cell: Cell, policy: str, found: dict[int, Record], full: dict[int, Record]) -> Row:
    records = [found[index] for index in sorted(found)]
    scores = np.asarray([record.score for record in records])
    pairs = np.asarray(
        [
            (record.score, full[record.index].score)
            for record in records
            if record.index in full and full[record.index].sha256 == record.sha256
        ]
    )
    kept = [record.retention for record in records if record.retention is not None]
    names = sorted({name for record in records for name in record.measures})
    lower = cell.task == FIDELITY
    return Row(
        cell=cell,
        policy=policy,
        score=interval_of(scores, lower),
        share=float(np.mean([record.share for record in records])),
        cache_bytes=round(float(np.mean([record.cache_bytes for record in records]))),
        bytes_read=round(float(np.mean([record.bytes_read for record in records]))),
        policy_bytes=records[0].policy_bytes,
        retention=float(np.mean(kept)) if kept else None,
        difference=None if policy == FULL or not len(pairs) else _difference(pairs[:, 0], pairs[:, 1], lower),
        lower_is_better=lower,
        measures={
            name: Interval.of(np.asarray([record.measures[name] for record in records if name in record.measures]))
            for name in names
        },
    )


def interval_of(scores: np.ndarray, lower_is_better: bool = False) -> Interval:
    """By what the numbers are: shares of right answers, scores in [0, 1], or divergences."""
    if lower_is_better:
        return Interval.of(scores)
    return Interval.wilson(scores) if np.all((scores == 0) | (scores == 1)) else Interval.bootstrap(scores)


def _difference(scores: np.ndarray, full: np.ndarray, lower_is_better: bool) -> Interval:
    """Paired by sample."""
    if not lower_is_better and np.all(np.isin([scores, full], (0.0, 1.0))):
        return Interval.paired_shares(scores, full)
    return Interval.of(scores - full) if lower_is_better else Interval.bootstrap(scores - full)


def _order(cell: Cell) -> tuple[str, str, int, str]:
    return cell.model, cell.task, cell.length, cell.mode


def _interval(value: Interval) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _numbers(value: Interval | None) -> list[str]:
    return ["", "", ""] if value is None else [_number(each) for each in (value.mean, value.low, value.high)]


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"
