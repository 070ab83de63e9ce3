"""Claims about answers that contain what was asked for: whole words, one after the other."""

import pytest

from kvx.eval.metrics.substring import name, normalised_substring, word
from kvx.eval.tasks.sample import Question


@pytest.mark.parametrize(
    ("answer", "answers", "expected"),
    [
        ("You told me: the Blue, bicycle!", ("a blue bicycle",), 1),
        ("a bicycle, blue", ("blue bicycle",), 0),
        ("15 days", ("5 days",), 0),  # words, not letters
        ("five", ("5", "five"), 1),
        ("anything", ("the",), 0),  # nothing is left to look for
        ("", ("x",), 0),
    ],
)
def test_normalised_substring(answer, answers, expected):
    assert normalised_substring(answer, Question("", answers)) == expected


def test_a_value_must_be_a_word():
    asked = Question("", ("8f2e-11",))
    assert [word(each, asked) for each in ('"8f2e-11".', "x8f2e-11", "8F2E-11", "")] == [1, 0, 0, 0]


def test_a_name_is_found_in_any_case_with_all_its_words():
    assert [name(each, Question("", ("ALICE",))) for each in ("It's Alice.", "Alices", "")] == [1, 0, 0]
    asked = Question("", ("DR. ALICE WU",))
    assert [name(each, asked) for each in ('"dr. Alice Wu"', "Wu, dr. Alice", "Alice")] == [1, 0, 0]
