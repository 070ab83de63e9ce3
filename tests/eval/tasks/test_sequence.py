"""Claims about copy and reverse: lists stand whole in the prose, and word accuracy is 1 less the word error rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.prompts import Frame
from kvx.eval.tasks.sample import Question
from kvx.eval.tasks.sequence import copy, reverse, word_accuracy
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters

WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def source():
    return Source(Letters(), prose(), Frame())


def accuracy(said, right):
    return word_accuracy(said, Question("", (right,)))


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("one two three four", 1),
        (" One, two, three, four.", 1),
        ("two three four", 0.75),  # the first was left out: the rest still counts
        ("one two five three four", 0.75),  # one too many
        ("one two four three", 0.5),  # two replaced
        ("four three two one", 0),  # four edits
        ("one", 0.25),
        ("", 0),
        ("a b c d e f g h i j", 0),  # ten edits of four words: not below 0
    ],
)
def test_word_accuracy_counts_edits(said, score):
    assert accuracy(said, "one two three four") == score


@given(said=WORDS, right=WORDS)
def test_word_accuracy_agrees_with_the_definition_by_recursion(said, right):
    def edits(one, other):
        if not one or not other:
            return len(one) + len(other)
        same = edits(one[1:], other[1:]) + (one[0] != other[0])
        return min(same, edits(one[1:], other) + 1, edits(one, other[1:]) + 1)

    expected = max(0.0, 1 - edits(said, right) / len(right))
    assert accuracy(" ".join(said), " ".join(right)) == pytest.approx(expected)


def test_a_list_has_its_items_and_both_tasks_ask_for_the_same_words_in_opposite_orders(source):
    for task, items in ((copy, 1), (copy, 9), (reverse, 9)):
        (sample,) = task(source, 1500, 1, 0, items=items)
        ((first, last),) = sample.evidence
        listed = sample.context[first:last].removeprefix("The list of words is: ").removesuffix(".").split()
        assert len(set(listed)) == items
        assert sample.questions[0].answers[0].split() == (listed if task is copy else listed[::-1])


def test_depths_are_those_of_the_samples_within_a_sentence(source):
    for index, sample in enumerate(sorted(copy(source, 6000, 5, 0), key=lambda each: each.depth)):
        assert sample.depth == pytest.approx((index + 0.5) / 5, abs=0.06)
