"""Claims about F1: values worked out by hand, best over answers, characters and segmented words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.metrics.f1 import character_f1, token_f1, token_f1_zh
from kvx.eval.tasks.sample import Question


def asked(*answers):
    return Question("", answers)


@pytest.mark.parametrize(
    ("answer", "answers", "expected"),
    [
        ("a b c", ("b c d",), 2 * 2 / (2 + 3)),  # the article is dropped: 2 of 2 words, 2 of 3
        ("cat cat cat", ("cat dog",), 2 * 1 / (3 + 2)),  # a word counts as often as on both sides
        ("The Eiffel Tower.", ("eiffel tower",), 1),
        ("Paris", ("London", "Paris, France"), 2 * 1 / (1 + 2)),
        ("", ("x",), 0),
        ("the", ("a",), 0),  # nothing is left of either
    ],
)
def test_token_f1(answer, answers, expected):
    assert token_f1(answer, asked(*answers)) == pytest.approx(expected)


def test_character_f1_counts_characters():
    assert character_f1("北京市", asked("北京")) == pytest.approx(2 * 2 / (3 + 2))
    assert character_f1("ab。", asked("b a")) == 1  # as bags, without marks and blanks
    assert character_f1("上", asked("下", "上")) == 1


def test_token_f1_zh_counts_segmented_words():
    pytest.importorskip("jieba")
    # 我 / 来到 / 北京 / 清华大学 against 北京 / 清华大学; the full stop is a word that normalisation drops.
    assert token_f1_zh("我来到北京清华大学。", asked("北京清华大学")) == pytest.approx(2 * 2 / (4 + 2))
    assert token_f1_zh("", asked("北京")) == 0


@given(st.text(alphabet="ab c.", max_size=20), st.text(alphabet="ab c.", max_size=20))
def test_f1_is_symmetric_and_within_bounds(one, other):
    for metric in (token_f1, character_f1):
        score = metric(one, asked(other))
        assert 0 <= score <= 1
        assert score == pytest.approx(metric(other, asked(one)))
