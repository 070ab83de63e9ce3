"""Claims about the vocabulary: plain words alone, and enough of them."""

import pytest

from kvx.errors import BadInput
from kvx.eval.prompts import Frame
from kvx.eval.tasks.source import Source
from kvx.eval.tasks.vocabulary import vocabulary
from kvx.prose import Prose
from tests.eval.letters import Letters


def source(text):
    return Source(Letters(), Prose("mine", text), Frame())


PARAGRAPH = (
    "Over the river, a grey heron waited; it's waiting still, and nobody counted the 1234 incomprehensible days."
)


def test_words_are_plain_and_each_comes_once():
    """Not: capitals, short words, apostrophes, marks, digits, words of more than nine letters."""
    found = vocabulary(source(f"{PARAGRAPH}\n\n{PARAGRAPH}"), 1, "some")
    assert found == ["counted", "grey", "heron", "nobody", "waiting"]


def test_a_text_of_too_few_words_is_refused():
    with pytest.raises(BadInput, match=r"text='mine' has 5 plain words .* task=some: at least 6"):
        vocabulary(source(f"{PARAGRAPH}\n\n{PARAGRAPH}"), 6, "some")
