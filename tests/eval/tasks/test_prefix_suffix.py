"""Claims about prefix and suffix retrieval: both are needed, and together they are enough."""

import re

from kvx.eval.prompts import Frame
from kvx.eval.tasks.prefix_suffix import prefix_suffix
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters


def test_neither_half_is_enough_and_both_are():
    for sample in prefix_suffix(Source(Letters(), prose(), Frame()), 3000, 3, 0):
        lines = re.findall(r"^[a-z]{16}$", sample.context, re.MULTILINE)
        assert len(set(lines)) == len(lines) > 100
        for question in sample.questions:
            right = question.answers[0]
            first, last = (
                {line for line in lines if line.startswith(right[:4])},
                {line for line in lines if line.endswith(right[-4:])},
            )
            assert len(first) >= 2 and len(last) >= 2 and first & last == {right}
            assert right[:4] in question.text and right[-4:] in question.text and right not in question.text
