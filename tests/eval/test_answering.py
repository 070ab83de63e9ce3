"""Claims about answering: each mode is what plain generation on the joined text gives, choices follow likelihood."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.eval.answering import answer, batches
from kvx.eval.prompts import Frame
from kvx.eval.tasks.sample import Question, Sample
from tests import tiny
from tests.eval.letters import Letters

CONTEXT = "The river rose at night. A boat came loose and drifted to the old mill, where nobody had lived for years."
QUESTIONS = (
    Question("\nWhere did it drift?\n", ("the mill",), "It drifted to", new_tokens=6),
    Question("\nWhat rose?\n", ("the river",), "It was", new_tokens=5),
    Question("\nWhen?\n", ("at night",), "It was:", new_tokens=7),
)
ASKED = Sample(CONTEXT, QUESTIONS)
OTHER = Sample(CONTEXT[:70], QUESTIONS)


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=2)


def answered(model, samples, mode, policies=None):
    """What each policy answers, by its text; the full cache's where no policy is named."""
    policies = policies or [kvx.policies.full()]
    (batch,) = batches(Letters(), Frame(), samples, len(samples), mode)
    return {policy.text: each for policy, each in answer(model, Letters(), batch, mode, policies)}


def plainly(model, text: str, count: int) -> str:
    """Greedy continuation of a text without any of this."""
    tokens = np.asarray([Letters().encode(text)])
    return Letters().decode(kvx.generate(model, tokens, max_new_tokens=count).tokens[0])


@pytest.mark.parametrize("mode", ["agnostic", "aware"])
def test_questions_of_one_context_are_answered_as_if_each_were_asked_alone(model, mode):
    found = answered(model, [ASKED, OTHER], mode)["full"]
    for row, sample in enumerate((ASKED, OTHER)):
        for index, question in enumerate(QUESTIONS):
            text = sample.context + question.text + question.prefix
            assert found.texts[row][index] == plainly(model, text, question.new_tokens)


def test_a_conversation_goes_on_from_the_right_answers(model):
    found = answered(model, [ASKED, OTHER], "turns")["full"]
    for row, sample in enumerate((ASKED, OTHER)):
        text = sample.context
        for index, question in enumerate(QUESTIONS):
            text += question.text + question.prefix
            assert found.texts[row][index] == plainly(model, text, question.new_tokens)
            text += " " + question.answers[0]


def test_a_policy_that_is_asked_nothing_while_it_compresses_sees_no_question(model):
    policy = kvx.policies.snapkv(0.5, window=8)
    first = answered(model, [ASKED], "agnostic", [policy])[policy.text]
    turned = answered(model, [replace(ASKED, questions=QUESTIONS[::-1])], "agnostic", [policy])[policy.text]
    assert first.texts[0] == turned.texts[0][::-1]
    kept = [np.asarray(each.cache.layers[0].positions()) for each in (first, turned)]
    assert np.array_equal(*kept)


def test_an_aware_policy_keeps_places_by_the_question(model):
    policy = kvx.policies.snapkv(0.5, window=8)
    kept = [
        np.asarray(
            answered(model, [Sample(CONTEXT, (each,))], "aware", [policy])[policy.text].cache.layers[0].positions()
        )
        for each in QUESTIONS[:2]
    ]
    assert not np.array_equal(*kept)


def likelihood(model, text: str, more: str) -> float:
    """By one plain forward pass."""
    ids = Letters().encode(text + more)
    scores = jax.nn.log_softmax(model(jnp.asarray([ids])))[0]
    start = len(Letters().encode(text))
    return float(sum(scores[at - 1, ids[at]] for at in range(start, len(ids))))


@pytest.mark.slow
def test_the_likeliest_choice_is_chosen(model):
    choices = ("the mill", "a boat", "Z", "nobody at all")
    asked = Question("\nWhere?\n", ("the mill",), "To ", kind="choose", choices=choices)
    sums = [likelihood(model, CONTEXT + asked.text + asked.prefix, each) for each in choices]
    found = answered(model, [Sample(CONTEXT, (asked,))], "agnostic")["full"]
    assert found.texts[0][0] == choices[int(np.argmax(sums))]


def test_a_likelihood_is_the_mean_over_the_answers_tokens(model):
    asked = [Question("\nWhere?\n", (text,), "To ", kind="likelihood") for text in ("the mill", "a far place")]
    samples = [Sample(CONTEXT, (question,)) for question in asked]
    found = answered(model, samples, "aware")["full"]
    for row, sample in enumerate(samples):
        (question,) = sample.questions
        expected = likelihood(model, CONTEXT + question.text + question.prefix, question.answers[0])
        assert found.likelihoods[row][0] == pytest.approx(expected / len(question.answers[0]), abs=1e-4)


def test_an_answer_ends_at_its_mark_but_not_before_anything_was_said(model):
    (plain,) = answered(model, [Sample(CONTEXT, QUESTIONS[:1])], "agnostic")["full"].texts
    mark = plain[0].strip()[2]
    cut = replace(QUESTIONS[0], stop=(mark,))
    (text,) = answered(model, [Sample(CONTEXT, (cut,))], "agnostic")["full"].texts[0]
    assert plain[0].startswith(text) and text.strip() and mark not in text.strip()[1:]


def test_batches_are_filled_up_and_have_one_shape():
    found = batches(Letters(), Frame(), [ASKED, OTHER, ASKED], 2, "agnostic")
    assert len(found) == 2 and {(each.width, each.room) for each in found} == {(found[0].width, found[0].room)}
    assert found[1].samples == (ASKED, ASKED)
