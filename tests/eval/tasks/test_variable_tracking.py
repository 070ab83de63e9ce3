"""Claims about variable tracking: chains are interleaved and kept in order, and the score is a share of names."""

import re

import pytest

from kvx.eval.prompts import Frame
from kvx.eval.tasks.sample import Question
from kvx.eval.tasks.source import Source
from kvx.eval.tasks.variable_tracking import share_of_names, shared_variable_tracking, variable_tracking
from kvx.prose import prose
from tests.eval.letters import Letters


@pytest.fixture(scope="module")
def source():
    return Source(Letters(), prose(), Frame())


def assignments(sample):
    return re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\.", sample.context)


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2), (2, 0)])
def test_every_chain_starts_at_a_value_and_hops_from_name_to_name(source, chains, hops):
    for sample in variable_tracking(source, 4000, 3, 0, chains=chains, hops=hops):
        held = {}
        for name, of in assignments(sample):
            assert name not in held and (of.isdigit() or of in held), "assigned once, from what is known"
            held[name] = held.get(of, of)
        counts = [list(held.values()).count(value) for value in set(held.values())]
        assert counts == [hops + 1] * chains
        names = sample.questions[0].answers[0].split()
        assert names == [name for name in held if held[name] == held[names[0]]]


def test_evidence_is_the_asked_chain_alone(source):
    (sample,) = variable_tracking(source, 4000, 1, 0, chains=3, hops=3)
    names = sample.questions[0].answers[0].split()
    assert [sample.context[first + 4 : first + 9] for first, _ in sample.evidence] == names
    assert all(sample.context[last - 1] == "." for _, last in sample.evidence)


def test_each_question_is_about_another_chain(source):
    (sample,) = shared_variable_tracking(source, 4000, 1, 0, chains=5, questions=3)
    assert len({question.answers for question in sample.questions}) == 3
    assert len(assignments(sample)) == 15 and len(sample.evidence) == 9


@pytest.mark.parametrize(
    ("answer", "score"),
    [("ABCDE, FGHIJ", 1), ("abcde and fghij", 1), ("FGHIJ", 0.5), ("ABCDE KLMNO", 0.5), ("ABCD", 0), ("", 0)],
)
def test_the_score_is_the_share_of_right_names(answer, score):
    assert share_of_names(answer, Question("", ("ABCDE FGHIJ",))) == score
