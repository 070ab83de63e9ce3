"""Claims about filling: lines first, then prose in front, and evidence still is what it was."""

import pytest

from kvx.errors import BadInput
from kvx.eval.prompts import Frame
from kvx.eval.tasks.filling import filled
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters

LINE = "a line of thirty characters..\n"


@pytest.fixture(scope="module")
def source():
    return Source(Letters(), prose(), Frame())


def build(lines):
    text = "Task.\n\n" + LINE * lines + "the answer"
    return Sample(text, (Question("?", ("the answer",)),), ((len(text) - 10, len(text)),), 1.0)


@pytest.mark.parametrize("length", [40, 300, 1024, 1030])
def test_another_line_would_not_fit_and_neither_would_another_word(source, length):
    found = filled(source, build, length, "some")
    lines, size = found.context.count(LINE), source.size(found)
    assert size <= length < source.size(build(lines + 1))
    opening = found.context.removesuffix(build(lines).context)
    taken = len(opening.split())
    assert size == length or size + len(source.words[taken]) + (1 if taken else 2) > length
    assert opening.split() == list(source.words[:taken])


def test_evidence_moves_with_the_text(source):
    for length in range(60, 120, 7):
        found = filled(source, build, length, "some")
        assert [found.context[first:last] for first, last in found.evidence] == ["the answer"]
        assert found.questions == build(0).questions and found.depth == 1.0


def test_what_does_not_fit_is_refused(source):
    with pytest.raises(BadInput, match="length=17 is too short for task=some; allowed: at least 18"):
        filled(source, build, 17, "some")
