"""Texts hidden between other texts, each whole, at chosen depths."""

from collections.abc import Callable, Sequence


def interleave(
    filling: Sequence[str],
    hidden: Sequence[tuple[float, str]],
    joint: str,
    label: Callable[[int], str] = lambda number: "",
) -> tuple[str, list[tuple[int, int]], list[float]]:
    """The filling in its order, the hidden texts between, no two of them at one place if there is room.

    Args:
        filling: texts.
        hidden: the depth of each, in [0, 1), as a share of the filling before it, and its text.
        joint: what stands between two texts.
        label: what stands before the text of a number; they are numbered from 1.

    Returns:
        The text; each hidden text's first and one past its last character; and the depth that each came to.
    """
    # Distinct places by rank: of n + 1 places, the first n + 2 - k are shared out, and the r-th text goes r further.
    shared = max(len(filling) + 2 - len(hidden), 1)
    order = sorted(range(len(hidden)), key=lambda index: hidden[index][0])
    places = [0] * len(hidden)
    for rank, index in enumerate(order):
        places[index] = min(int(hidden[index][0] * shared) + rank, len(filling))

    pieces: list[tuple[str, int | None]] = [(text, None) for text in filling]
    for index in reversed(order):
        pieces.insert(places[index], (hidden[index][1], index))
    texts, spans, length = [], [(0, 0)] * len(hidden), 0
    for number, (text, index) in enumerate(pieces, 1):
        before = (joint if texts else "") + label(number)
        if index is not None:
            spans[index] = (length + len(before), length + len(before) + len(text))
        texts.append(before + text)
        length += len(texts[-1])
    return "".join(texts), spans, [place / max(len(filling), 1) for place in places]
