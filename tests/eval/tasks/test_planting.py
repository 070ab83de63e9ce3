"""Claims about planting: evidence is what the answers rest on, in the order of the questions; nothing may be hidden."""

import pytest

from kvx.eval.tasks.haystack import Haystack
from kvx.eval.tasks.planting import planted
from kvx.eval.tasks.sample import Question

HAY = Haystack(tuple(["One", "two.", "Three", "four.", "Five", "six."]), 0)
NEEDLES = [(0.9, "Last needle."), (0.3, "First needle."), (0.6, "Middle needle.")]
ASKED = Question("?", ("needle",))


def test_evidence_comes_in_the_order_asked_for_and_behind_the_task():
    sample = planted("Task: ", HAY, NEEDLES, [ASKED], [0, 1])(6)
    assert sample.context == "Task: One two. First needle. Three four. Middle needle. Five six. Last needle."
    assert [sample.context[first:last] for first, last in sample.evidence] == ["Last needle.", "First needle."]
    assert sample.depth == 1.0


def test_several_questions_have_no_one_depth():
    sample = planted("", HAY, NEEDLES, [ASKED, ASKED], [0, 1])(12)
    assert sample.depth is None and len(sample.questions) == 2


@pytest.mark.parametrize("words", [0, 1, 6, 13])
def test_nothing_hidden_is_prose_alone(words):
    sample = planted("Task: ", HAY, [], [ASKED], [])(words)
    assert sample.context == "Task: " + " ".join(HAY.take(words)) and sample.evidence == () and sample.depth is None
