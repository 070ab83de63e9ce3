"""Claims about facts as needles: nothing is ambiguous, nothing is part of something else, all kinds are drawn."""

import re

import numpy as np
import pytest

from kvx.eval.prompts import Frame
from kvx.eval.tasks.needle_facts import NAMES, PLACES, THINGS, facts_of, needle_facts, shared_needle_facts
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters


@pytest.fixture(scope="module")
def source():
    return Source(Letters(), prose(), Frame())


@pytest.mark.parametrize("kind", [NAMES, THINGS, PLACES])
def test_no_word_is_part_of_another(kind):
    assert len(set(kind)) == len(kind) == len(NAMES)
    assert not [(one, other) for one in kind for other in kind if one != other and one.lower() in other.lower()]


def test_facts_share_nothing():
    for count in (1, 7, len(NAMES)):
        facts = facts_of(np.random.default_rng(count), count)
        for part in ("name", "thing", "place"):
            assert len({getattr(fact, part) for fact in facts}) == count


def test_all_facts_are_hidden_and_the_asked_ones_are_the_evidence(source):
    (sample,) = shared_needle_facts(source, 3000, 1, 0, facts=6, questions=2)
    assert len(re.findall(r"\w+ left the \w+ in the \w+\.", sample.context)) == 6
    for question, (first, last) in zip(sample.questions, sample.evidence, strict=True):
        assert sample.context[first:last] == f"{question.prefix} {question.answers[0]}."


def test_a_single_fact_has_the_depth_of_its_sample(source):
    for index, sample in enumerate(sorted(needle_facts(source, 6000, 4, 0), key=lambda each: each.depth)):
        assert sample.depth == pytest.approx((index + 0.5) / 4, abs=0.06)
