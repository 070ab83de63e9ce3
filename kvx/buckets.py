"""Buckets: the few lengths that prompts and generations are padded to, so that few programs are compiled."""

from collections.abc import Iterator
from itertools import count

STEP = 128

LANE = 16
"""Capacities are rounded up to this many slots: the sublane tile of a 16-bit array on a TPU."""


def edges() -> Iterator[int]:
    """128 x {1, 1.5, 2, 3, 4, 6, 8, 12, ...}."""
    for power in count():
        yield STEP << power
        yield (STEP << power) * 3 // 2


def bucket(length: int) -> int:
    """The smallest bucket that holds `length`; above 128, less than a third of it is padding."""
    return next(edge for edge in edges() if edge >= length)


def part(need: int, most: int, parts: int = 8) -> int:
    """`need`, which is at most `most`, rounded up to so many equal parts of that: as few sizes, and little padding.

    For what is less than a bucket away from its worst case, where a bucket would save nothing.
    """
    step = -(-most // parts)
    return -(-need // step) * step


def shortest(length: int) -> int:
    """The smallest length that shares `length`'s bucket: a static lower bound that changes no more often than it."""
    below = 0
    for edge in edges():
        if edge >= length:
            return below + 1
        below = edge
    raise AssertionError("edges() does not end")


def round_up(count: int, multiple: int = LANE) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple
