"""Claims about key-value retrieval: the object is JSON, and a larger one asks the same."""

import json
import re

import pytest

from kvx.eval.prompts import Frame
from kvx.eval.tasks.key_value import key_value, shared_key_value
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters


@pytest.fixture(scope="module")
def source():
    return Source(Letters(), prose(), Frame())


def pairs(sample):
    return json.loads(sample.context[sample.context.index("{") :])


@pytest.mark.parametrize(("digits", "form"), [(8, "[0-9a-f]{8}"), (32, "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")])
def test_keys_and_values_have_their_form_and_keys_come_once(source, digits, form):
    (sample,) = key_value(source, 3000, 1, 0, digits=digits)
    found = pairs(sample)
    assert len(found) == sample.context.count('": "') > 20
    assert all(re.fullmatch(form, text) for pair in found.items() for text in pair)


def test_the_asked_pair_stands_at_its_depth(source):
    for index, sample in enumerate(sorted(key_value(source, 4000, 5, 0), key=lambda each: each.depth)):
        keys = list(pairs(sample))
        key = re.findall(r'"(\w+)"', sample.questions[0].text)[0]
        assert sample.depth == keys.index(key) / len(keys) == pytest.approx((index + 0.5) / 5, abs=1 / len(keys))


def test_questions_are_about_different_keys_in_different_stretches(source):
    (sample,) = shared_key_value(source, 4000, 1, 0, questions=5)
    keys = list(pairs(sample))
    at = [keys.index(re.findall(r'"(\w+)"', question.text)[0]) / len(keys) for question in sample.questions]
    assert sorted(int(5 * depth) for depth in at) == [0, 1, 2, 3, 4]
    lines = [sample.context[first:last] for first, last in sample.evidence]
    assert [question.answers[0] in line for question, line in zip(sample.questions, lines, strict=True)] == [True] * 5
