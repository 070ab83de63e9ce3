"""Claims about frequent words: recounts, the zeta distribution worked out, the literal prompt."""

import re

import numpy as np
import pytest

from kvx.eval.tasks import registry
from kvx.eval.tasks.ruler.frequent_words import LEAST, counts
from tests.eval.tasks.ruler.pieces import source
from tests.eval.tasks.ruler.solvers import coded


def make(length, count=3, seed=0):
    return registry.find("ruler/fwe").make(source(), length, count, seed)


def test_counts_are_the_zeta_distribution_rounded_down():
    # zeta(2) = 1.644934: 1000 / zeta(2) = 607.93, and its 4th, 9th, 16th and 25th part.
    assert counts(1000, 5).tolist() == [607, 151, 67, 37, 24]


def test_what_is_asked_for_is_strictly_more_frequent_than_what_is_not():
    # (1 / 16 - 1 / 25) / zeta(2) = 1 / 73.1: from 74 draws on, ranks four and five are one apart before rounding.
    for draws in range(LEAST, 1000):
        found = counts(draws, 40)
        assert np.all(np.diff(found[:5]) < 0) and np.all(np.diff(found) <= 0)
    assert counts(LEAST - 1, 5)[3] == counts(LEAST - 1, 5)[4]


@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_recounted_the_asked_words_are_ranks_two_to_four(length):
    for sample in make(length):
        words = coded(sample.context + sample.questions[0].text)
        ranked = words.most_common()
        assert ranked[0][0] == "..." and tuple(word for word, _ in ranked[1:4]) == sample.questions[0].answers
        assert ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1] > ranked[4][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        # One word for fifty tokens; the rarest may not occur.
        assert 5 <= len(words) <= max((length - 50) // 50, 5)


def test_the_prompt_is_the_published_one():
    (sample,) = make(2048, 1)
    (question,) = sample.questions
    assert sample.context.startswith(
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    assert question.text == (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    assert question.prefix == (
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    assert question.new_tokens == 50


def test_words_are_spread_over_the_text():
    (sample,) = make(4096, 1)
    words = sample.context.split("coded words. ", 1)[1].split(" ")
    for word in sample.questions[0].answers:
        places = [at / len(words) for at, each in enumerate(words) if each == word]
        assert min(places) < 0.25 and max(places) > 0.75
