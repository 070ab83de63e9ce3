"""Claims about ROUGE-L's two variants: values worked out by hand, and where they differ."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.metrics.rouge import rouge_l, rouge_l_zh, rouge_lsum
from kvx.eval.tasks.sample import Question


def asked(*answers):
    return Question("", answers)


@pytest.mark.parametrize("metric", [rouge_l, rouge_lsum])
@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 2 * 3 / (4 + 4)),
        ("the gunman kill police", "police killed the gunman", 2 * 2 / (4 + 4)),  # the order counts
        ("", "x", 0),
        ("y", "x", 0),
    ],
)
def test_one_sentence_is_matched_by_its_longest_common_subsequence(metric, answer, right, expected):
    assert metric(answer, asked(right)) == pytest.approx(expected)


def test_sentences_of_the_candidate_are_united():
    # Lin's example: of w1 .. w5, the first finds w1 w2, the second w1 w3 w5.
    right, first, second = "w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8", "w1 w3 w8 w9 w5"
    assert rouge_l(f"{first}. {second}", asked(right)) == pytest.approx(2 * 4 / (5 + 8))  # different words
    assert rouge_lsum(f"{first}\n{second}", asked(right)) == pytest.approx(2 * 4 / (5 + 10))


def test_rouge_l_counts_different_words_and_lsum_every_one():
    assert rouge_l("b b b c", asked("b c")) == 1
    assert rouge_lsum("b b b c", asked("b c")) == pytest.approx(2 * 2 / (4 + 2))


def test_lsum_counts_a_word_as_often_as_it_is_on_both_sides():
    # "a b" and "a c" are both found in "a b c", whose one "a" is a hit once.
    assert rouge_lsum("a b c", asked("a b\na c")) == pytest.approx(2 * 3 / (3 + 4))


def test_of_two_longest_subsequences_each_variant_takes_its_own():
    # Of "x y" and "y x", rouge takes y, so that the further sentence "x" adds a word; rouge-score takes x twice.
    assert rouge_l("y x. x", asked("x y")) == 1
    assert rouge_lsum("y x\nx", asked("x y")) == pytest.approx(2 * 1 / (2 + 3))


def test_what_a_word_is_differs():
    assert rouge_l("The cat, sat", asked("the cat sat")) == pytest.approx(2 * 1 / (3 + 3))  # as it is written
    assert rouge_lsum("The cat, sat", asked("the cat sat")) == 1
    assert rouge_l("x. ", asked("x.")) == pytest.approx(2 * 1 / (2 + 1))  # the blank is a sentence of an empty word
    assert rouge_l("...", asked("x")) == 0


def test_the_best_of_several_answers_counts():
    assert rouge_l("b c", asked("q", "b c d d")) == pytest.approx(2 * 2 / (2 + 3))
    assert rouge_lsum("b c", asked("q", "b c d d")) == pytest.approx(2 * 2 / (2 + 4))


def test_long_sentences_do_not_fail():
    text = " ".join(f"w{number}" for number in range(700))
    assert rouge_l(text, asked(text)) == 1


def test_chinese_is_segmented_first():
    pytest.importorskip("jieba")
    assert rouge_l_zh("我来到北京清华大学", asked("北京清华大学")) == pytest.approx(2 * 2 / (4 + 2))


@given(st.text(alphabet="ab .\n", max_size=30), st.text(alphabet="ab .\n", max_size=30))
def test_scores_are_within_bounds_and_a_text_is_like_itself(one, other):
    for metric, counts in ((rouge_l, bool(one.replace(".", ""))), (rouge_lsum, any(each in one for each in "ab"))):
        assert 0 <= metric(one, asked(other)) <= 1
        assert metric(one, asked(one)) == counts
