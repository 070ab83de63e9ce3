"""Claims about integers in answers: shares, first ones, leading ones."""

import pytest

from kvx.eval.metrics.integers import first_integer, integer_share, leading_integers
from kvx.eval.tasks.sample import Question


@pytest.mark.parametrize("right", ["3", "Paragraph 3", "段落3"])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Paragraph 3", 1), ("3 and 4", 1 / 2), ("3, 3 or 30", 2 / 3), ("13", 0), ("three", 0), ("", 0)],
)
def test_all_integers_of_an_answer_count(right, answer, expected):
    assert integer_share(answer, Question("", (right,))) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(" 01234.", 1), ("is 01234, not 5", 1), ("1234", 0), ("5 or 01234", 0), ("", 0)],
)
def test_the_first_integer_counts_digit_by_digit(answer, expected):
    assert first_integer(answer, Question("", ("01234",))) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 4, -2, 8]", 1),
        ("1 4 -2 8 99", 1),  # more may follow
        ("[1, 4, 2, 8]", 2 / 4),  # the sign counts, and what follows an error does not
        ("[4, -2, 8]", 0),
        ("", 0),
    ],
)
def test_a_list_counts_from_its_beginning(answer, expected):
    assert leading_integers(answer, Question("", ("[1, 4, -2, 8]",))) == expected
