"""Running text of any length with sentences hidden in it, between sentences, at chosen depths."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvx.errors import BadInput
from kvx.eval.tasks.source import Source

_ENDS = (".", "!", "?", '."', ".)", '?"', '!"')


@dataclass(frozen=True)
class Haystack:
    """Consecutive words of prose from one place on, round and round.

    Attributes:
        words: of the whole prose.
        start: the first word that is taken: the beginning of a sentence.
    """

    words: tuple[str, ...]
    start: int

    @classmethod
    def of(cls, source: Source, random: np.random.Generator) -> "Haystack":
        """From a sentence's beginning that chance picks.

        Raises:
            BadInput: prose without any.
        """
        if not source.words:
            raise BadInput(f"text={source.prose.name!r} has no running text to hide in; allowed: a paragraph at least")
        begins = [0, *(at + 1 for at, word in enumerate(source.words[:-1]) if word.endswith(_ENDS))]
        return cls(source.words, begins[int(random.integers(len(begins)))])

    def take(self, count: int) -> list[str]:
        """`count` words; a text that ends is begun again."""
        return [self.words[(self.start + at) % len(self.words)] for at in range(count)]

    def hide(self, count: int, needles: Sequence[tuple[float, str]]) -> tuple[str, list[tuple[int, int]], list[float]]:
        """`count` words with needles between their sentences.

        Args:
            count: words of prose.
            needles: the depth of each, as a share of the prose that comes before it, and its text. 0 and 1 are the very
                ends, other depths the sentence end nearest to them.

        Returns:
            The text; each needle's first and one past its last character; and the depth that each came to.
        """
        prose = self.take(count)
        ends = np.asarray([0, *(at + 1 for at, word in enumerate(prose[:-1]) if word.endswith(_ENDS)), count])
        spots = [int(ends[np.argmin(np.abs(ends - depth * count))]) for depth, _ in needles]
        pieces, spans, length, taken = [], [(0, 0)] * len(needles), 0, 0
        for index in sorted(range(len(needles)), key=lambda index: (spots[index], needles[index][0])):
            for text, needle in ((" ".join(prose[taken : spots[index]]), None), (needles[index][1], index)):
                if not text:
                    continue
                length += bool(pieces)  # the blank that joins
                if needle is not None:
                    spans[needle] = (length, length + len(text))
                pieces.append(text)
                length += len(text)
            taken = spots[index]
        if taken < count:
            pieces.append(" ".join(prose[taken:]))
        return " ".join(pieces), spans, [spot / count if count else 0.0 for spot in spots]
