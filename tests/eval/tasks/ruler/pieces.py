"""A tokenizer of word pieces, about as many as real ones make; and a source that checks what its samples must be."""

import re
from collections.abc import Callable
from functools import cache

from kvx.eval.prompts import Frame
from kvx.eval.tasks.sample import Sample
from kvx.eval.tasks.source import Source
from kvx.prose import prose

_PIECES = re.compile(r" ?\w{1,4}|\s|[^\w\s]")


class Pieces:
    """Four letters, a mark or a blank are a token; ids say nothing, only their number does."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """As many zeros as the text has pieces, and one for the text's begin."""
        return [0] * (len(_PIECES.findall(text)) + add_special)


class Strict(Source):
    """A source that asserts of every sample that it fits and that the next larger would not."""

    def largest(self, build: Callable[[int], Sample], length: int, task: str, spare: int = 0) -> Sample:
        sizes = []

        def noted(size: int) -> Sample:
            sizes.append(size)
            return build(size)

        sample = super().largest(noted, length, task, spare)
        assert build(sizes[-1]) == sample, "a size has two samples"
        assert self.size(sample) <= length - spare < self.size(build(sizes[-1] + 1))
        return sample


_PROSE = prose()


@cache
def source(tokenizer=None) -> Strict:
    """Of a tokenizer, or of pieces; made once."""
    return Strict(tokenizer or Pieces(), _PROSE, Frame())
