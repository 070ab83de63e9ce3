"""Passkey retrieval (Mohtashami and Jaggi 2023): a number hidden in prose, at depths that cover the text evenly."""

import re

import numpy as np

from kvx.eval.tasks.haystack import Haystack
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one, random_of, spread

DIGITS = 5

_TASK = (
    "There is a pass key hidden in the text below. Find it and memorise it. I will ask you about it after the text.\n\n"
)
_QUESTION = "\n\nWhat is the pass key in the text above?\n"
_PREFIX = "The pass key is"


def first_number(answer: str, question: Question) -> float:
    """1.0 if the first number of an answer is the right one; commas and blanks between digits do not count."""
    digits = re.search(r"\d+", re.sub(r"(?<=\d)[ ,](?=\d)", "", answer))
    return float(digits is not None and digits[0] in question.answers)


@task("passkey", score=first_number, group="retrieval", binary=True)
def passkey(source: Source, length: int, count: int, seed: int) -> list[Sample]:
    """A five-digit number hidden in real prose."""
    return [
        _sample(source, length, spread(index, count), random_of(seed, "passkey", length, index))
        for index in range(count)
    ]


def _sample(source: Source, length: int, depth: float, random: np.random.Generator) -> Sample:
    key = str(random.integers(10 ** (DIGITS - 1), 10**DIGITS))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    hay = Haystack.of(source, random)
    asked = Question(_QUESTION, (key,), _PREFIX, new_tokens=10, stop=(".", "\n"))

    def build(words: int) -> Sample:
        text, spans, depths = hay.hide(words, [(depth, needle)])
        evidence = tuple((len(_TASK) + first, len(_TASK) + last) for first, last in spans)
        return one(_TASK + text, asked, evidence=evidence, depth=depths[0])

    return source.largest(build, length, "passkey")
