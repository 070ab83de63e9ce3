"""Claims about passkey prompts: lengths, whole needles, depths, seeds, and what counts as found."""

import re

import pytest

from kvx.errors import BadInput
from kvx.eval.prompts import Frame
from kvx.eval.tasks.passkey import passkey
from kvx.eval.tasks.registry import find
from kvx.eval.tasks.sample import Question
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters


@pytest.fixture(scope="module")
def source():
    return Source(Letters(), prose(), Frame())


@pytest.mark.parametrize("length", [1024, 4096])
def test_prompts_fill_their_length_and_hold_an_intact_needle(source, length):
    for sample in passkey(source, length, 3, 0):
        assert 0.99 * length <= source.size(sample) <= length
        ((first, last),) = sample.evidence
        (key,) = sample.questions[0].answers
        assert sample.context[first:last] == f"The pass key is {key}. Remember it. {key} is the pass key."
        assert sample.context.count(key) == 2
        # It stands between sentences.
        assert re.search(r"[.!?\"')]$", sample.context[:first].rstrip())


def test_depths_cover_the_text_evenly_and_are_met_within_a_sentence(source):
    found = passkey(source, 4096, 8, 3)
    for index, sample in enumerate(sorted(found, key=lambda each: each.depth)):
        assert sample.depth == pytest.approx((index + 0.5) / 8, abs=0.1)
        assert sample.evidence[0][0] / len(sample.context) == pytest.approx(sample.depth, abs=0.05)


def test_a_seed_gives_the_same_prompts_another_gives_others_and_prose_differs_between_samples(source):
    assert passkey(source, 600, 2, 1) == passkey(source, 600, 2, 1)
    one, other = passkey(source, 600, 2, 1), passkey(source, 600, 2, 2)
    assert one[0].questions != other[0].questions and one[0].context != other[0].context
    assert one[0].context[-60:] != one[1].context[-60:]


@pytest.mark.parametrize(
    ("answer", "correct"),
    [(" 12345.", 1), ("the key is 12345", 1), (" 12,345", 1), (" 1 2 3 4 5.", 1), (" 12346", 0), (" 123456", 0),
     ("", 0), (" 9 or 12345", 0)],
)  # fmt: skip
def test_the_first_number_of_the_answer_must_be_the_key(answer, correct):
    assert find("passkey").score(answer, Question("?", ("12345",))) == correct


def test_a_length_that_is_too_short_is_refused_with_the_least(source):
    with pytest.raises(BadInput, match=r"length=100 is too short for task=passkey; allowed: at least \d+") as told:
        passkey(source, 100, 1, 0)
    least = int(str(told.value).split()[-1])
    assert source.size(passkey(source, least, 1, 0)[0]) <= least
