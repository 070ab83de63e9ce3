"""Ranking by two aims at once: more quality, fewer bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

BEYOND = 2.0
"""How far beyond the limit the corner lies from which area is measured. At the limit itself, the best of those that use
all of it would cover none."""


@dataclass(frozen=True)
class Point:
    """What one candidate reached.

    Attributes:
        name: whose.
        quality: higher is better.
        nbytes: a token, positive.
    """

    name: str
    quality: float
    nbytes: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other equals or beats in both, by rising bytes; of equal ones the first by name."""
    best, kept = -math.inf, []
    for point in sorted(points, key=lambda point: (point.nbytes, -point.quality, point.name)):
        if point.quality > best:
            best = point.quality
            kept.append(point)
    return kept


def ranked(points: Sequence[Point], limit: float) -> list[Point]:
    """All points, the most worth pursuing first.

    One frontier after the other is taken off; within one, a point counts by the area that only it covers, over
    quality and the logarithm of bytes, so that halving them counts the same everywhere. Points no better than the worst
    quality cover nothing and come last: keeping nothing at all would otherwise always be on the frontier.

    Args:
        limit: bytes a token that are allowed.
    """
    left, order = list(points), []
    worst = min((point.quality for point in points), default=0.0)
    corner = math.log2(max(limit, *(point.nbytes for point in points)) * BEYOND) if points else 0.0
    while edge := [point for point in frontier(left) if point.quality > worst]:
        areas = {}
        for index, point in enumerate(edge):
            right = math.log2(edge[index + 1].nbytes) if index + 1 < len(edge) else corner
            below = edge[index - 1].quality if index else worst
            areas[point.name] = (right - math.log2(point.nbytes)) * (point.quality - below)
        order += sorted(edge, key=lambda point: (-areas[point.name], point.name))
        left = [point for point in left if point not in edge]
    return [*order, *sorted(left, key=lambda point: (-point.quality, point.nbytes, point.name))]
