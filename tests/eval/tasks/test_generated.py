"""Claims about every task that is generated here: it can be solved, its length is met, its answers lie everywhere."""

import numpy as np
import pytest

import kvx
from kvx.errors import BadInput
from kvx.eval.prompts import Frame
from kvx.eval.tasks import registry
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters
from tests.eval.tasks.oracles import ORACLES

TASKS = sorted(ORACLES)
SHARED = [name for name in TASKS if name.startswith("shared/")]
LENGTH = 4096
PLACED = sorted({*TASKS} - {"arithmetic", "long_arithmetic", "many_shot", "shared/many_shot"})
"""Those whose answers have places of their own; of the others, all of the context says how to answer."""


@pytest.fixture(scope="module")
def source():
    return Source(Letters(), prose(), Frame())


@pytest.fixture(scope="module")
def made(source):
    """Four samples of every task, made once."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = registry.find(name).make(source, LENGTH, 4, 0)
        return found[name]

    return of


def prompt(sample, question):
    return sample.context + question.text + question.prefix


def test_no_generated_task_is_without_an_oracle():
    suites = {name.split("/")[0] for name in registry.names() if "/" in name} - {"shared"}
    own = {name for name in registry.names() if name.split("/")[0] not in suites}
    generated = {name for name in own if "path" not in registry.find(name).options}
    assert generated == {*TASKS, "needle_control"}


@pytest.mark.parametrize("name", TASKS)
def test_an_oracle_that_sees_the_prompts_text_alone_scores_1(made, name):
    for sample in made(name):
        for question in sample.questions:
            answer = ORACLES[name](prompt(sample, question))
            assert registry.find(name).score(answer, question) == 1, answer


@pytest.mark.parametrize("name", TASKS)
def test_the_first_right_answer_scores_1_and_silence_and_the_prose_score_0(made, source, name):
    score = registry.find(name).score
    for question in (question for sample in made(name) for question in sample.questions):
        assert isinstance(question.answers, tuple) and all(isinstance(each, str) for each in question.answers)
        assert score(question.answers[0], question) == 1
        assert score(f" {question.answers[0]}.\n", question) == 1
        assert score("", question) == 0
        assert score("These equivalences assume nothing.", question) == 0


@pytest.mark.parametrize("name", sorted({*TASKS} - {"needle"}))
def test_answers_cannot_be_guessed_from_those_of_other_samples(made, name):
    """The needle's is one for all: hence its control. Labels are few, words of a sequence may recur."""
    score, questions = registry.find(name).score, [sample.questions[0] for sample in made(name)]
    others = [score(other.answers[0], asked) for asked in questions for other in questions if other is not asked]
    assert np.mean(others) < 0.2


@pytest.mark.parametrize("name", TASKS)
def test_lengths_are_met_within_1_per_cent_and_never_exceeded(made, source, name):
    for sample in made(name):
        assert 0.99 * LENGTH < source.size(sample) <= LENGTH


@pytest.mark.parametrize("name", TASKS)
def test_an_answer_has_the_room_it_needs(made, source, name):
    for question in (question for sample in made(name) for question in sample.questions):
        assert len(source.tokenizer.encode(question.answers[0], add_special=False)) < question.new_tokens


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_samples_and_another_gives_others(source, name):
    first, again, other = (list(registry.find(name).make(source, 1500, 2, seed)) for seed in (1, 1, 2))
    assert first == again
    assert len({sample.context for sample in first + other}) == 4


@pytest.mark.parametrize("name", PLACED)
def test_evidence_is_what_the_answers_rest_on(made, name):
    """Whole sentences or lines: without them, the answers are not in the context any more."""
    for sample in made(name):
        assert sample.evidence
        for question in sample.questions:
            texts = [sample.context[first:last] for first, last in sample.evidence]
            assert all(any(word in text for text in texts) for word in question.answers[0].split())


@pytest.mark.parametrize("name", PLACED)
def test_answers_lie_at_depths_that_cover_the_text(source, name):
    """Of eight samples' places, each quarter of the context holds its share, to one place a sample."""
    samples = registry.find(name).make(source, LENGTH, 8, 3)
    places = np.asarray([[first / len(sample.context) for first, _ in sample.evidence] for sample in samples]).ravel()
    shares = np.histogram(places, bins=4, range=(0, 1))[0] / len(places)
    np.testing.assert_allclose(shares, 0.25, atol=0.13)
    assert places.min() < 0.2 and places.max() > 0.8
    if len(samples[0].questions) == 1:
        assert all(sample.depth is not None and 0 <= sample.depth <= 1 for sample in samples)


@pytest.mark.parametrize("name", SHARED)
def test_questions_over_one_context_are_equally_many_and_differ(made, name):
    samples = made(name)
    assert {len(sample.questions) for sample in samples} == {len(samples[0].questions)} and len(
        samples[0].questions
    ) > 1
    for sample in samples:
        assert len({question.text for question in sample.questions}) == len(sample.questions)
        assert sample.depth is None


@pytest.mark.parametrize("name", TASKS)
def test_what_is_too_short_is_refused_in_a_sentence(source, name):
    with pytest.raises(BadInput, match=f"length=80 is too short for task={name}; allowed: at least"):
        registry.find(name).make(source, 80, 1, 0)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, option, 0) for name in TASKS for option in registry.find(name).options if option != "hops"]
    + [("variable_tracking", "hops", -1), ("shared/find_number", "questions", 6), ("many_shot", "classes", 1)]
    + [("key_value", "digits", 33), ("shared/variable_tracking", "questions", 5), ("copy", "items", 10**6)]
    + [("needle_facts", "facts", 25), ("arithmetic", "steps", True)],
)
def test_options_outside_their_range_are_refused(source, name, option, value):
    with pytest.raises(BadInput, match="allowed"):
        registry.find(name).make(source, LENGTH, 1, 0, **{option: value})


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_a_real_tokenizer_meets_lengths_and_solves_all_the_same(chat):
    _, tokenizer = kvx.load("smollm2-135m-instruct")
    source = Source(tokenizer, prose(), Frame.of(tokenizer, chat))
    for name in TASKS:
        for length in (1024, 4096):
            for sample in registry.find(name).make(source, length, 2, 0):
                assert 0.99 * length < source.size(sample) <= length, (name, length)
                for question in sample.questions:
                    answer = ORACLES[name](prompt(sample, question))
                    assert registry.find(name).score(answer, question) == 1, (name, length)
                    taken = tokenizer.encode(question.answers[0], add_special=False)
                    assert len(taken) < question.new_tokens, (name, len(taken))
