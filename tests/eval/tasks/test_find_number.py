"""Claims about statistics of a list: numbers differ, their count is odd, each statistic is what its name says."""

import statistics

import numpy as np

from kvx.eval.prompts import Frame
from kvx.eval.tasks.find_number import STATISTICS, find_number
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters


def test_statistics_are_those_of_the_list():
    for sample in find_number(Source(Letters(), prose(), Frame()), 3000, 3, 0, questions=5):
        numbers = [int(each) for each in sample.context.split("\n\n")[-1].rstrip(".").split(", ")]
        assert len(set(numbers)) == len(numbers) > 300 and len(numbers) % 2 == 1
        right = dict(zip(STATISTICS, (int(question.answers[0]) for question in sample.questions), strict=True))
        assert right["largest"] == max(numbers) and right["smallest"] == min(numbers)
        assert right["median"] == statistics.median(numbers)
        assert sum(number >= right["second largest"] for number in numbers) == 2
        assert sum(number <= right["second smallest"] for number in numbers) == 2
        places = [numbers.index(number) / len(numbers) for number in right.values()]
        assert sorted(int(5 * place) for place in places) == [0, 1, 2, 3, 4], "each in a stretch of its own"
        assert np.isclose(len(numbers), len(sample.context) / 8, rtol=0.05)
