"""Claims about mixed turns: kinds alternate, and as many of each kind are hidden as there are turns."""

import re

import pytest

from kvx.eval.prompts import Frame
from kvx.eval.tasks.mixed import mixed
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters


@pytest.mark.parametrize("questions", [2, 5])
def test_kinds_alternate_and_what_is_not_asked_is_hidden_too(questions):
    (sample,) = mixed(Source(Letters(), prose(), Frame()), 3000, 1, 0, questions=questions)
    kinds = ["Where" in question.text for question in sample.questions]
    assert kinds == [turn % 2 == 0 for turn in range(questions)]
    assert len(re.findall(r"left the \w+ in the \w+\.", sample.context)) == questions
    assert len(re.findall(r'The value of "\w+" is "\w+"\.', sample.context)) == questions
    for question, (first, last) in zip(sample.questions, sample.evidence, strict=True):
        assert (
            sample.context[first:last].startswith(question.prefix) and question.answers[0] in sample.context[first:last]
        )
