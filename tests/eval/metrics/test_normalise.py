"""Claims about what does not count in an answer, and in which order it is left out."""

import pytest

from kvx.eval.metrics.normalise import normalised, normalised_zh


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat.", "cat sat"),
        ("an apple a day", "apple day"),
        ("theatre Anna", "theatre anna"),  # articles are whole words
        ("U.S.A.", "usa"),  # marks go, and leave no blank
        ("a.n", ""),  # ... before articles are looked for, so that marks can make one
        ("\n\t", ""),
    ],
)
def test_case_marks_articles_and_blanks_do_not_count(text, expected):
    assert normalised(text) == expected
    assert normalised(expected) == expected


def test_chinese_loses_both_kinds_of_marks_and_all_blanks():
    assert normalised_zh("「红 楼 梦」, ABC\uff01") == "红楼梦abc"
    assert normalised_zh("《红楼梦》") == "《红楼梦"  # the published list lacks one mark of the pair
