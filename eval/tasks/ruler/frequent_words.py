"""RULER's frequent words: a text of made-up words whose counts fall with the square of their rank."""

import math
from string import ascii_lowercase

import numpy as np
from jaxtyping import Int

from kvx.eval.metrics.string_match import match_all
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one, random_of

ASKED = 3
LETTERS = 6
DOTS = "..."
"""Stands for the most frequent word."""

LEAST = 53
"""Draws from which on each of the first five ranks occurs more often than the next, counts being whole."""

_NEW_TOKENS = 50
_TASK = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


@task("ruler/fwe", score=match_all, group="ruler")
def frequent_words(source: Source, length: int, count: int, seed: int) -> list[Sample]:
    """The three most frequent made-up words; dots, which are more frequent still, do not count.

    The answer rests on the whole text, so no place in it is evidence.
    """
    # One word for each fifty tokens; the dots, what is asked, and a word that is less frequent are there at any length.
    ranks = max((length - _NEW_TOKENS) // 50, ASKED + 2)
    found = []
    for index in range(count):
        random = random_of(seed, "ruler/fwe", length, index)
        order = int(random.integers(2**32))
        words: dict[str, None] = {DOTS: None}
        while len(words) < ranks:
            words["".join(random.choice(list(ascii_lowercase), LETTERS))] = None
        vocabulary = np.asarray(list(words))
        asked = Question(_QUESTION, tuple(map(str, vocabulary[1 : 1 + ASKED])), _PREFIX, new_tokens=_NEW_TOKENS)

        def build(size: int, vocabulary=vocabulary, asked=asked, order=order) -> Sample:
            text = np.repeat(vocabulary, counts(LEAST + size, len(vocabulary)))
            return one(_TASK + " ".join(np.random.default_rng(order).permutation(text)), asked)

        found.append(source.largest(build, length, "ruler/fwe", spare=_NEW_TOKENS))
    return found


def counts(draws: int, ranks: int) -> Int[np.ndarray, "K"]:
    """How often each rank occurs: the zeta distribution of exponent 2 (the paper's alpha), rounded down."""
    zeta = math.pi**2 / 6
    return (draws / (zeta * np.arange(1, ranks + 1) ** 2.0)).astype(int)
