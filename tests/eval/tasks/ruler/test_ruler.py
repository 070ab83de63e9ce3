"""Claims about all of RULER's generated tasks: solvable by the text alone, exact lengths, seeds, evidence, refusals."""

from functools import cache

import pytest

from kvx.errors import BadInput
from kvx.eval.tasks import registry
from kvx.models import zoo
from kvx.models.readers import read_checkpoint
from kvx.models.tokenizer import Tokenizer
from tests.eval.tasks.ruler.pieces import source
from tests.eval.tasks.ruler.solvers import SOLVERS

EVERY = pytest.mark.parametrize("name", sorted(SOLVERS))


@cache
def make(name, length=2048, count=2, seed=0):
    """Samples, which several claims are about."""
    return registry.find(name).make(source(), length, count, seed)


def test_the_thirteen_tasks_are_registered():
    found = [name for name in registry.names() if name.startswith("ruler/")]
    assert found == sorted([*SOLVERS, "ruler/qa_1", "ruler/qa_2"])
    assert len({registry.find(name).about for name in found}) == 13


@EVERY
@pytest.mark.parametrize("length", [2048, 4096])
def test_a_solver_that_sees_only_the_text_scores_fully_and_silence_nothing(name, length):
    task = registry.find(name)
    for sample in make(name, length):
        (question,) = sample.questions
        assert task.score(SOLVERS[name](sample.context + question.text), question) == 1
        assert task.score("", question) == 0
        assert task.score(question.prefix, question) == 0
        assert task.score(", ".join(question.answers), question) == 1
        assert not set(question.answers) & set(question.text.split()), "the question gives its answer"


@EVERY
@pytest.mark.parametrize("length", [2048, 4096])
def test_lengths_are_met_within_one_percent_with_room_for_the_answer(name, length):
    # That the next larger size would not fit is asserted by the source.
    for sample in make(name, length):
        tokens = source().size(sample) + sample.questions[0].new_tokens
        assert 0.99 * length <= tokens <= length


@pytest.mark.slow
@pytest.mark.weights
@EVERY
def test_a_real_tokenizer_meets_lengths_within_one_percent(name, smollm2):
    where = source(smollm2)
    for sample in registry.find(name).make(where, 2048, 2, 0):
        tokens = where.size(sample) + sample.questions[0].new_tokens
        assert 0.99 * 2048 <= tokens <= 2048


@pytest.fixture(scope="module")
def smollm2():
    return Tokenizer.from_checkpoint(read_checkpoint(zoo.fetch("smollm2-135m-instruct")))


@EVERY
def test_a_seed_gives_the_same_samples_and_another_gives_others(name):
    first, other = make(name), make(name, seed=1)
    assert first == registry.find(name).make(source(), 2048, 2, 0)
    assert all(one.questions[0].answers != two.questions[0].answers for one, two in zip(first, other, strict=True))
    assert first[0].questions[0].answers != first[1].questions[0].answers


@EVERY
def test_what_is_asked_does_not_depend_on_the_number_of_samples(name):
    few, many = make(name, count=1), make(name)
    assert few[0].questions == many[0].questions
    if name in ("ruler/vt", "ruler/cwe", "ruler/fwe"):
        assert few == many[:1]


@EVERY
def test_answers_lie_in_the_evidence_in_their_order(name):
    for sample in make(name):
        (question,) = sample.questions
        found = [sample.context[first:last] for first, last in sample.evidence]
        if name in ("ruler/cwe", "ruler/fwe"):
            assert not found and sample.depth is None
        else:
            assert len(found) == len(question.answers)
            assert all(answer in text for answer, text in zip(question.answers, found, strict=True))
            assert sample.depth is not None and 0 <= sample.depth <= 1


@EVERY
def test_a_length_that_cannot_hold_the_task_is_refused(name):
    with pytest.raises(BadInput, match=rf"length=150 is too short for task={name}; allowed: at least \d+"):
        make(name, 150)
