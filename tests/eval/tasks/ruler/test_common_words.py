"""Claims about common words: recounts of the list and of the example, literal prompts, words for any length."""

from collections import Counter

import pytest

from kvx.eval.tasks import registry
from kvx.eval.tasks.ruler.word_lists import english
from tests.eval.tasks.ruler.pieces import Pieces, source
from tests.eval.tasks.ruler.solvers import listed

TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
PREFIX = " Answer: The top 10 words that appear most often in the list are:"


def make(length, count=2, seed=0, where=None):
    return registry.find("ruler/cwe").make(where or source(), length, count, seed)


@pytest.mark.parametrize(("length", "often", "seldom"), [(2048, 6, 1), (4095, 6, 1), (4096, 30, 3), (6000, 30, 3)])
def test_the_asked_words_are_strictly_the_most_frequent(length, often, seldom):
    for sample in make(length):
        (question,) = sample.questions
        counts = listed(sample.context + question.text)
        assert len(question.answers) == len(set(question.answers)) == 10
        assert {counts.pop(word) for word in question.answers} == {often}
        assert set(counts.values()) == {seldom} and len(counts) > 20


@pytest.mark.parametrize(("length", "words", "often", "seldom"), [(2048, 20, 3, 1), (4096, 40, 10, 3)])
def test_the_example_is_solved_and_has_words_of_its_own(length, words, often, seldom):
    (sample,) = make(length, 1)
    example = sample.context[: sample.context.rindex(TASK)]
    assert example.startswith(TASK) and example.count(TASK) == 1
    prompt, _, answer = example.partition(PREFIX)
    counts = listed(prompt)
    common = {word for word, times in counts.items() if times == often}
    assert len(counts) == words and set(counts.values()) == {often, seldom}
    assert Counter(listed(TASK + answer.strip() + "\nQuestion:").values()) == {1: 10}
    assert set(listed(TASK + answer.strip() + "\nQuestion:")) == common
    assert answer.startswith(" 1. ") and answer.endswith("\n") and not answer.endswith("\n\n")
    assert not set(counts) & set(listed(sample.context + QUESTION))


def test_the_prompt_is_the_published_one_and_items_are_numbered():
    (sample,) = make(2048, 1)
    (question,) = sample.questions
    assert (question.text, question.prefix, question.new_tokens) == (QUESTION, PREFIX, 120)
    assert sample.context.count(TASK) == 2
    items = sample.context[sample.context.rindex(TASK) + len(TASK) :]
    total = sum(listed(sample.context + question.text).values())
    assert items.startswith("1. ") and f" {total}. " in items and f" {total + 1}. " not in items


def test_common_words_are_spread_over_the_list():
    (sample,) = make(4096, 1)
    items = sample.context[sample.context.rindex(TASK) + len(TASK) :].split(". ")[1:]
    words = [item.rsplit(" ", 1)[0] for item in items]
    for word in sample.questions[0].answers:
        places = [at / len(words) for at, each in enumerate(words) if each == word]
        assert min(places) < 0.3 and max(places) > 0.7


def test_longer_lists_than_there_are_words_go_on_with_compounds():
    class Characters(Pieces):
        """Eighty characters are a token, so that a short length holds many words."""

        def encode(self, text, add_special=True):
            return [0] * (len(text) // 80 + 1)

    (sample,) = make(5000, 1, where=source(Characters()))
    counts = listed(sample.context + sample.questions[0].text)
    assert len(counts) > len(english()) and set(counts.values()) == {30, 3}
