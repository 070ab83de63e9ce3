"""Claims about many-shot classification: the shots decide the label, and without doubt; guesses do not score."""

import re
from collections import Counter

import pytest

from kvx.errors import BadInput
from kvx.eval.prompts import Frame
from kvx.eval.tasks.many_shot import CUES, ITEM, first_word, many_shot, shared_many_shot
from kvx.eval.tasks.sample import Question
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters


@pytest.fixture(scope="module")
def source():
    return Source(Letters(), prose(), Frame())


def shots(sample):
    return re.findall(r"Item: (.+)\nLabel: (.+)", sample.context)


def asked(question):
    return question.text.removeprefix("\n\nItem: ").strip()


def test_classes_are_asked_for_equally_often(source):
    """Within a sample labels are its own; which class was asked shows in the order of cues over eight samples."""
    samples = shared_many_shot(source, 3000, 2, 0, classes=4, questions=4)
    for sample in samples:
        assert len({question.answers[0] for question in sample.questions}) == 4


def test_shots_are_balanced_and_the_asked_item_is_not_among_them(source):
    for sample in many_shot(source, 4000, 3, 0, classes=3):
        found = shots(sample)
        counts = Counter(label for _, label in found)
        assert len(counts) == 3 and max(counts.values()) - min(counts.values()) <= CUES
        assert asked(sample.questions[0]) not in {item for item, _ in found}
        assert all(len(item.split()) == len(set(item.split())) == ITEM for item, _ in found)


def test_even_the_shortest_prompt_shows_the_cue(source):
    """One round of all cues is the least that there is; where it stops to fit depends on the words drawn."""
    (sample,) = next(found for length in range(700, 1000, 20) if (found := shortest(source, length)))
    right = {label for item, label in shots(sample) if set(item.split()) & set(asked(sample.questions[0]).split())}
    assert 4 * CUES <= len(shots(sample)) <= 4 * CUES + 6 and sample.questions[0].answers[0] in right


def shortest(source, length):
    try:
        return many_shot(source, length, 1, 0)
    except BadInput:
        return None


def test_evidence_is_every_item_with_a_cue_that_is_asked_for(source):
    (sample,) = many_shot(source, 3000, 1, 0)
    texts = [sample.context[first:last] for first, last in sample.evidence]
    assert len(texts) >= 2
    shared = set.intersection(*(set(text.split("\n")[0].split()[1:]) for text in texts))
    (cue,) = shared & set(asked(sample.questions[0]).split())
    assert len(texts) == sum(cue in item.split() for item, _ in shots(sample))
    assert {text.split()[-1] for text in texts} == set(sample.questions[0].answers)


@pytest.mark.parametrize(
    ("answer", "score"),
    [(" river", 1), ("River.", 1), ("\n“river”", 1), ("stone river", 0), ("rivers", 0), ("", 0), ("...", 0)],
)
def test_only_the_first_word_counts_and_only_whole(answer, score):
    assert first_word(answer, Question("", ("river",))) == score
