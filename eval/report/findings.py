"""What a table of results says in a sentence: the smallest cache, and the least read, that are as good as the full one.

As good means: the mean lies within the 95 % interval of the full cache's mean, or beyond its better end. It is a
reading aid and no test; the table holds the paired differences.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvx.eval.job import FULL
from kvx.eval.records import Cell
from kvx.eval.report.policy_names import label
from kvx.eval.statistics import Interval
from kvx.eval.summary import Row

MODES = {"agnostic": "question unseen", "aware": "question seen", "turns": "as a conversation"}
"""A cell's mode in words: what a policy knew of the question when it compressed."""

LONGEST = 120
"""Characters of a policy in a sentence."""


@dataclass(frozen=True)
class Finding:
    """A sentence and what it is about.

    Attributes:
        subject: a model, or a task with its model where there are several.
        sentence: without the subject.
    """

    subject: str
    sentence: str


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Over all cells of a model first, then cell by cell, in the order of the rows."""
    models = list(dict.fromkeys(row.cell.model for row in rows))
    found = []
    for model in models:
        of_model = [row for row in rows if row.cell.model == model]
        cells = list(dict.fromkeys(row.cell for row in of_model))
        found += [Finding(model, sentence) for sentence in _everywhere(of_model, cells)]
    for cell in dict.fromkeys(row.cell for row in rows):
        sentence = _smallest([row for row in rows if row.cell == cell], cell)
        subject = cell.task if len(models) == 1 else f"{cell.model}, {cell.task}"
        found += [Finding(subject, sentence)] if sentence else []
    return found


def as_good(row: Row, full: Row) -> bool:
    """Whether a row's mean lies within the full cache's interval, or is better."""
    return row.score.mean <= full.score.high if row.lower_is_better else row.score.mean >= full.score.low


def _everywhere(rows: Sequence[Row], cells: Sequence[Cell]) -> Iterable[str]:
    """Of the policies that are as good in every cell: which keeps least, and which reads least."""
    full = {row.cell: row for row in rows if row.policy == FULL}
    if len(cells) < 2 or len(full) < len(cells):
        return
    by_policy: dict[str, list[Row]] = {}
    for row in rows:
        by_policy.setdefault(row.policy, []).append(row)
    good = {
        policy: of_policy
        for policy, of_policy in by_policy.items()
        if policy != FULL and len(of_policy) == len(cells) and all(as_good(row, full[row.cell]) for row in of_policy)
    }
    where = f"in all {len(cells)} combinations of task, length and mode"
    kept = {policy: _mean(row.share for row in of_policy) for policy, of_policy in good.items()}
    read = {policy: _mean(_read(row) for row in of_policy) for policy, of_policy in good.items()}
    whole = _mean(row.share for row in full.values())
    smaller = [policy for policy, share in kept.items() if share < whole]
    if smaller:
        best = min(smaller, key=kept.__getitem__)
        yield f"{_name(best)} is the smallest as good {where}: {_percent(kept[best])} of the bytes on average."
    else:
        yield f"No smaller cache is as good {where}."
    least = min(read, key=read.__getitem__, default=None)
    if least is not None and least not in smaller and read[least] < whole:
        shares = f"it keeps {_percent(kept[least])} and reads {_percent(read[least])} a step"
        yield f"{_name(least)} is as good {where}; {shares}."


def _smallest(rows: Sequence[Row], cell: Cell) -> str | None:
    full = next((row for row in rows if row.policy == FULL), None)
    others = [row for row in rows if full is not None and row.policy != FULL and row.share < full.share]
    if full is None or not others:
        return None
    where = f"{cell.length} tokens, {MODES.get(cell.mode, cell.mode)}"
    reference = f"the full cache's {_number(full.score)} ({full.score.count} samples)"
    good = [row for row in others if as_good(row, full)]
    if good:
        best = min(good, key=lambda row: row.share)
        return f"{where}: {_name(best.policy)} with {_percent(best.share)}, {best.score.mean:.3g} against {reference}."
    near = min(others, key=lambda row: row.score.mean * (1 if row.lower_is_better else -1))
    return (
        f"{where}: no smaller cache is as good as {reference}; "
        f"the nearest is {_name(near.policy)} with {_percent(near.share)}, {near.score.mean:.3g}."
    )


def _read(row: Row) -> float:
    """Bytes read as a share of a bfloat16 full cache."""
    return row.share * row.bytes_read / max(1, row.cache_bytes)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _name(policy: str) -> str:
    """Its text, to be copied; but a calibrated policy may name a thousand heads."""
    return policy if len(policy) <= LONGEST else label(policy)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _number(interval: Interval) -> str:
    return f"{interval.mean:.3g} [{interval.low:.3g}, {interval.high:.3g}]"
