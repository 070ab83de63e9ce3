"""Scores by depth and length, for the tasks whose answers lie somewhere: the boxes of the needle heat maps."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvx.eval.records import Record
from kvx.eval.statistics import Interval
from kvx.eval.summary import interval_of

SAMPLES = 5
"""That a box should hold: fewer make a picture of chance."""

FEWEST, MOST = 3, 10
"""Depths that a map tells apart."""


@dataclass(frozen=True)
class DepthMap:
    """One policy's scores on one task in one mode.

    Attributes:
        model, task, mode, policy: whose.
        bins: equal ranges of depth, the first at the start of the text.
        boxes: the scores of each length and range that holds samples.
    """

    model: str
    task: str
    mode: str
    policy: str
    bins: int
    boxes: dict[tuple[int, int], Interval]


def depth_maps(records: Sequence[Record]) -> list[DepthMap]:
    """A map for each model, task, mode and policy whose samples have a depth, in the order of the records."""
    grouped: dict[tuple[str, str, str, str], list[Record]] = defaultdict(list)
    samples: dict[tuple[str, str], int] = defaultdict(int)
    # A sample that was answered twice counts once, as in the summary.
    for record in {(each.cell, each.policy, each.index): each for each in records}.values():
        if record.depth is not None:
            grouped[record.cell.model, record.cell.task, record.cell.mode, record.policy].append(record)
            task = record.cell.model, record.cell.task
            samples[task] = max(samples[task], record.index + 1)
    return [_map(*key, _bins(samples[key[:2]]), found) for key, found in grouped.items()]


def _bins(samples: int) -> int:
    return max(FEWEST, min(MOST, samples // SAMPLES))


def _map(model: str, task: str, mode: str, policy: str, bins: int, records: Sequence[Record]) -> DepthMap:
    scores: dict[tuple[int, int], list[float]] = defaultdict(list)
    for record in records:
        place = min(max(int((record.depth or 0.0) * bins), 0), bins - 1)
        scores[record.cell.length, place].append(record.score)
    boxes = {key: interval_of(np.array(scores[key])) for key in sorted(scores)}
    return DepthMap(model, task, mode, policy, bins, boxes)
