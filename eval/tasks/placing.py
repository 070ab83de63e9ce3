"""Where things stand: depths that cover a text evenly, lines at depths of a list, and the characters they take."""

from collections.abc import Collection, Sequence

import numpy as np

from kvx.eval.tasks.source import spread


def even_depths(random: np.random.Generator, index: int, count: int, parts: int) -> list[float]:
    """The depths of `parts` things in one of `count` samples, in an order that chance picks.

    Each of `parts` equal stretches of the text holds one. Over all samples they lie on an even grid of `parts * count`
    depths, and each thing is as likely in every stretch.
    """
    return [(int(part) + spread(index, count)) / parts for part in random.permutation(parts)]


def interleave(asked: Sequence[str], others: Sequence[str], depths: Sequence[float]) -> tuple[list[str], list[int]]:
    """One list of both, `asked` at given depths and `others` in their order around them.

    Args:
        depths: of each line of `asked`, as a share of the list's lines before it; `1 / len(asked)` apart or more.

    Returns:
        The lines, and where each of `asked` stands.
    """
    total = len(asked) + len(others)
    at = [min(int(depth * total), total - 1) for depth in depths]
    lines = list(others)
    for index in sorted(range(len(asked)), key=at.__getitem__):  # from the front on: no later one moves an earlier one
        lines.insert(at[index], asked[index])
    return lines, at


def joined(
    before: str, lines: Sequence[str], joint: str, after: str, marked: Collection[int]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Lines as one text.

    Args:
        joint: between two lines.
        marked: lines to find again.

    Returns:
        The text, and the first and one past the last character of each marked line, in the order of `marked`.
    """
    starts = len(before) + np.cumsum([0, *(len(line) + len(joint) for line in lines)])
    spans = tuple((int(starts[at]), int(starts[at]) + len(lines[at])) for at in marked)
    return before + joint.join(lines) + after, spans
