"""Claims about the one number of an answer: marks, boxes, separators, signs."""

from decimal import Decimal

import pytest

from kvx.eval.metrics.numbers import extracted, final_number, first_number, last_word_number
from kvx.eval.tasks.sample import Question


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48 + 24 = 72 clips.\n#### 72", 72),
        ("#### 72\nThat is 3 dozens and 36.", 72),  # the mark decides
        ("#### 1 no: #### 2", 2),  # the last one
        (r"so $\boxed{1,234}$ of 5", 1234),
        (r"\boxed{\text{42}} of 5", 42),
        ("#### none, but 7 before? 8", 7),
        ("no number after 9 ####", 9),  # an empty mark decides nothing
        ("It costs $1,234.50.", Decimal("1234.5")),
        ("12,345,678", 12345678),
        ("1,2,3", 3),  # a list, not thousands
        ("12,3456", 3456),
        ("the answer is -5.", -5),
        ("minus -$5", -5),
        ("\u22125", -5),
        ("7-3", 3),  # between two numbers it is no sign
        ("(4)-3", 3),
        ("3.0", 3),
        ("no digits", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_ends_at(text, expected):
    assert extracted(text) == expected


def test_numbers_are_compared_as_numbers():
    asked = Question("", ("#### 1,000",))
    assert [final_number(each, asked) for each in ("1000.00", "$1000", "100", "-1000", "")] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [("45, then 46", "45", 1), ("46, then 45", "45", 0), ("4.5", "4.5", 1), ("45.0", "45", 1), ("", "45", 0)],
)
def test_the_first_number_counts(answer, right, expected):
    assert first_number(answer, Question("", (right,))) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("the value is: -17.", 1), ("`-17`", 1), ("-17", 1), ("17", 0), ("-17 exactly", 0), ("- 17", 0), ("", 0)],
)
def test_the_last_word_must_be_the_number(answer, expected):
    assert last_word_number(answer, Question("", ("-17",))) == expected
