"""What tasks make their samples from: a tokenizer, prose to hide things in, and how long a prompt comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from kvx.errors import BadInput
from kvx.eval.prompts import Frame
from kvx.eval.tasks.sample import Question, Sample
from kvx.prose import Prose

TRIAL = 64
"""Units at which the cost of a unit is measured."""


@dataclass(frozen=True)
class Source:
    """Where samples come from.

    Attributes:
        tokenizer: the model's.
        prose: filling text; tasks take it from its first half.
        frame: what stands around a prompt: a chat template, or nothing.
    """

    tokenizer: Any
    prose: Prose
    frame: Frame

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The filling text word by word, in its order, line breaks left out."""
        return tuple(" ".join(self.prose.haystack).split())

    def size(self, sample: Sample) -> int:
        """Tokens of a sample's prompt up to where its first question is answered: the longest of its questions counts.

        Everything that a model reads before it answers: frame, context, question and the answer's opening.
        """
        return self.frame.size(self.tokenizer, sample)

    def largest(self, build: Callable[[int], Sample], length: int, task: str, spare: int = 0) -> Sample:
        """The largest of a family of samples whose prompt fits.

        Args:
            build: the sample of a size, from 0 on; a larger one has no fewer tokens.
            length: tokens of the prompt at most.
            task: named in a refusal.
            spare: of `length`, tokens to leave free: RULER counts those of the answer.

        Raises:
            BadInput: even the smallest sample does not fit.
        """
        room, least = length - spare, self.size(build(0))
        if least > room:
            raise BadInput(f"length={length} is too short for task={task}; allowed: at least {least + spare}")

        def fits(size: int) -> bool:
            return self.size(build(size)) <= room

        # What one unit costs says where to look; bisection does the rest.
        rate = max((self.size(build(TRIAL)) - least) / TRIAL, 1e-3)
        low, high = 0, int((room - least) / rate) + 1
        while fits(high):
            low, high = high, high + high // 8 + 1
        if low == 0 and fits(near := high - high // 8 - 1):
            low = near
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return build(low)


def random_of(seed: int, task: str, length: int, index: int) -> np.random.Generator:
    """The randomness of one sample: by its address, so that a task's first samples do not depend on their count."""
    return np.random.default_rng([seed, length, index, *task.encode()])


def spread(index: int, count: int) -> float:
    """The depth of one of `count` samples: depths cover [0, 1] evenly, each in the middle of its part."""
    return (part(index, count) + 0.5) / count


def part(index: int, count: int) -> int:
    """Which of `count` parts of the text is a sample's, each one's of its own.

    The order is van der Corput's, so that samples which a run got to before it was stopped lie all over the text.
    """
    return _order(count)[index]


@cache
def _order(count: int) -> tuple[int, ...]:
    """The numbers below `count`, by their bits from the last to the first."""
    bits = (count - 1).bit_length()
    order = (int(format(each, f"0{bits}b")[::-1], 2) for each in range(1 << bits))
    return tuple(each for each in order if each < count)


def one(context: str, question: Question, **more: Any) -> Sample:
    """A sample of one question."""
    return Sample(context, (question,), **more)
