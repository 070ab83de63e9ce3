"""Claims about RULER's scores: shares, case, substrings, control characters."""

import pytest

from kvx.eval.metrics.string_match import match_all, match_part
from kvx.eval.tasks.sample import Question


def asked(*answers):
    return Question("", answers)


@pytest.mark.parametrize(
    ("answer", "answers", "everything", "one"),
    [
        ("", ("1234567",), 0, 0),
        ("It is 1234567.", ("1234567",), 1, 1),
        ("1111111, 2222222 and 4444444", ("1111111", "2222222", "3333333", "4444444"), 3 / 4, 1),
        ("denver broncos", ("Denver Broncos", "Broncos"), 1, 1),
        ("the Broncos", ("Denver Broncos", "Broncos"), 1 / 2, 1),
        ("a CART", ("art",), 1, 1),  # the published trap: a part of a word counts
        ("2 111", ("211",), 0, 0),
        ("red\x00\tblue", ("red\n\nblue",), 1, 1),  # control characters are line breaks
        ("\x01red\x02", ("red",), 1, 1),
    ],
)
def test_the_share_of_right_texts_and_whether_there_is_one(answer, answers, everything, one):
    assert match_all(answer, asked(*answers)) == everything
    assert match_part(answer, asked(*answers)) == one


def test_all_right_texts_in_a_row_score_fully():
    answers = ("abc", "bcd", "x-ray")
    assert match_all(" ".join(answers), asked(*answers)) == 1
