"""Successive halving (Jamieson and Talwalkar 2016): few samples for all, more for those that do well on them.

Of all candidates that have a rung's samples, the better half goes on to the next rung, whenever they came (as in Li et
al. 2020, "A System for Massively Parallel Hyperparameter Tuning"). Samples grow fourfold while candidates halve, since
a frontier needs several candidates on the last rung, not one.
"""

import math
from collections.abc import Mapping, Sequence

from kvx.eval.search.ranking import Point, ranked

GROWTH = 4
"""Times as many samples on the next rung."""

SHARE = 0.5
"""Part of a rung's candidates that goes on."""


def rungs(first: int, last: int) -> tuple[int, ...]:
    """Sample counts: 4, 16, 64 for 4 and 64; the last one whatever it is."""
    counts = [min(first, last)]
    while counts[-1] < last:
        counts.append(min(counts[-1] * GROWTH, last))
    # A last step of a few samples more would cost a pass and say nothing.
    return tuple(counts if len(counts) < 3 or counts[-1] >= 2 * counts[-2] else [*counts[:-2], counts[-1]])


def promoted(scores: Mapping[str, Sequence[float]], nbytes: Mapping[str, float], rung: int, limit: float) -> list[str]:
    """The candidates that deserve more samples than a rung's, the best first.

    Args:
        scores: quality by sample, of every candidate within the limit, in the order in which samples are spent.
        nbytes: a token.
        rung: samples that count. Those who have more are judged by the same ones: comparisons are paired.
        limit: bytes a token.
    """
    points = [
        Point(name, math.fsum(found[:rung]) / rung, nbytes[name])
        for name, found in scores.items()
        if len(found) >= rung
    ]
    return [point.name for point in ranked(points, limit)[: math.ceil(SHARE * len(points))]]
