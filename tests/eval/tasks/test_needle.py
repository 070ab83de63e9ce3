"""Claims about the needle: ends are ends, sentences stay whole, key words are words, the control has no needle."""

import numpy as np
import pytest

from kvx.eval.prompts import Frame
from kvx.eval.tasks.needle import KEY_WORDS, NEEDLE, needle, needle_control, share_of_key_words
from kvx.eval.tasks.sample import Question
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters

ANSWER = Question("", ("eat a sandwich and sit in Dolores Park on a sunny day.",))


@pytest.fixture(scope="module")
def source():
    return Source(Letters(), prose(), Frame())


def test_the_grid_of_depths_is_even_and_its_ends_are_ends(source):
    samples = sorted(needle(source, 6000, 5, 0), key=lambda sample: sample.depth)
    np.testing.assert_allclose([sample.depth for sample in samples], np.linspace(0, 1, 5), atol=0.05)
    assert samples[0].depth == 0 and samples[-1].depth == 1
    assert samples[0].context.startswith(f"Read the text below. I will ask you about it.\n\n{NEEDLE} ")
    assert samples[-1].context.endswith(NEEDLE)


def test_the_needle_stands_between_sentences(source):
    for sample in sorted(needle(source, 6000, 5, 0), key=lambda sample: sample.depth)[1:-1]:
        ((first, last),) = sample.evidence
        assert sample.context[first:last] == NEEDLE
        assert sample.context[:first].rstrip()[-1] in '.!?)"' and sample.context[last] == " "


def test_the_control_is_the_same_question_over_prose_alone(source):
    (control,), (sample,) = needle_control(source, 4000, 1, 0), needle(source, 4000, 1, 0)
    assert control.questions == sample.questions and control.evidence == () and control.depth is None
    assert not any(word in control.context for word in ("San Francisco", "Dolores", "sandwich"))
    assert len(control.context) == pytest.approx(len(sample.context), abs=20)


def test_the_opening_gives_no_key_word_away(source):
    (sample,) = needle(source, 2000, 1, 0)
    assert share_of_key_words(sample.questions[0].text + sample.questions[0].prefix, ANSWER) == 0
    assert sample.questions[0].prefix + " " + sample.questions[0].answers[0] == NEEDLE


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("eat a sandwich and sit in Dolores Park on a sunny day", 1),
        ("Eating sandwiches in Dolores\nPark on sunny days!", 1),
        ("eat a sandwich in Dolores Park", 0.6),
        ("sit in the park on a sunny day", 0.4),
        ("go there today, on Sunday, for a seat", 0),
        ("", 0),
    ],
)
def test_key_words_count_where_words_begin(answer, share):
    assert share_of_key_words(answer, ANSWER) == pytest.approx(share) and len(KEY_WORDS) == 5
