"""RULER's common words: a numbered list in which ten words occur far more often than the others."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from kvx.eval.metrics.string_match import match_all
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.ruler.word_lists import shuffled
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one, random_of

COMMON = 10
SHORT = 4096
"""Shorter prompts repeat words less, in the list and in the example."""

_TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_PREFIX = " Answer: The top 10 words that appear most often in the list are:"


@task("ruler/cwe", score=match_all, group="ruler")
def common_words(source: Source, length: int, count: int, seed: int) -> list[Sample]:
    """The ten most common words of a list; a worked example stands first.

    The answer rests on the whole list, so no place in it is evidence. Where the list needs more words than there are
    (8,000; from some 100,000 tokens on), compounds of two follow; the published generator has another list for that.
    """
    often, seldom = (6, 1) if length < SHORT else (30, 3)
    words, example_often, example_seldom = (20, 3, 1) if length < SHORT else (40, 10, 3)
    found = []
    for index in range(count):
        random = random_of(seed, "ruler/cwe", length, index)
        example_order, order = (int(each) for each in random.integers(2**32, size=2))
        stream = shuffled(random)
        shown, asked = list(islice(stream, words)), list(islice(stream, COMMON))
        listed = _listed(shown[:COMMON], example_often, shown[COMMON:], example_seldom, example_order)
        before = f"{_TASK}{listed}{_QUESTION}{_PREFIX} {_numbered(shown[:COMMON])}\n{_TASK}"
        question = Question(_QUESTION, tuple(asked), _PREFIX, new_tokens=120)
        rare: list[str] = []

        def build(size: int, before=before, question=question, rare=rare, stream=stream, order=order) -> Sample:
            rare.extend(islice(stream, max(size - len(rare), 0)))
            return one(before + _listed(question.answers, often, rare[:size], seldom, order), question)

        found.append(source.largest(build, length, "ruler/cwe", spare=question.new_tokens))
    return found


def _listed(common: Sequence[str], often: int, rare: Sequence[str], seldom: int, order: int) -> str:
    """The list of words in an order that a seed gives, so that a size always has the same text."""
    occurrences = [*common] * often + [*rare] * seldom
    return _numbered([occurrences[at] for at in np.random.default_rng(order).permutation(len(occurrences))])


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
