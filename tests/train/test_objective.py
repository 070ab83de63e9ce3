"""Claims about what a stage minimises: relations across a conversion, and preferences against their reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.train.batch import Batch, Pairs
from kvx.train.convert import recipe
from kvx.train.forward import run
from kvx.train.objective import Distillation, Preference
from kvx.train.relations import relation_loss
from kvx.train.stage import LossSection
from tests.train.convert import layers
from tests.train.tiny_runs import LENGTH, models

ROWS, PROMPT = 3, 9
BETA = 0.3


SLOW = [pytest.param(part, marks=pytest.mark.slow) for part in ("queries", "values")]


@pytest.mark.parametrize("part", ["keys", *SLOW])
def test_a_conversion_that_keeps_every_pair_has_the_relations_of_its_source(part):
    """A head's keys are those that its own queries meet, though rows of the cache hold all heads' rotary blocks."""
    source, tokens = layers.model(), jnp.asarray(layers.texts(2, 12))
    converted, _ = recipe("mha2mla", rank=32, rotary=32)(source, layers.moments())
    ones = jnp.ones(tokens.shape, jnp.int32)
    mine, theirs = (getattr(run(each, tokens, heads=True).heads, part) for each in (converted, source))
    assert float(relation_loss(mine, theirs, ones, ones > 0)) < 1e-6
    assert float(relation_loss(mine, theirs[:, :, ::-1], ones, ones > 0)) > 1e-2, "and it can tell heads apart"


@pytest.mark.slow
def test_the_relation_loss_of_such_a_conversion_is_zero_and_so_is_its_gradient():
    source, tokens = layers.model(), layers.texts(2, 12)
    converted, _ = recipe("mha2mla", rank=32, rotary=32)(source, layers.moments())
    ones = np.ones(tokens.shape, np.int32)
    batch = Batch(tokens, ones, np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape), ones > 0)
    loss = Distillation(LossSection(kl=0.0, relation=1.0))
    slope = jax.jit(jax.value_and_grad(lambda *given: loss(*given)[0]))
    value, gradient = slope(converted, source, jax.tree.map(jnp.asarray, batch))
    assert abs(float(value)) < 1e-6
    slopes = jax.tree.leaves(gradient)
    assert max(float(jnp.abs(slope).max()) for slope in slopes) < 1e-4


def pairs(seed: int = 0, junk: int = 0) -> Pairs:
    """Answers of several lengths to the same prompts; `junk` stands where a row is padded."""
    random = np.random.default_rng(seed)
    asked, index = random.integers(1, 96, (ROWS, PROMPT)), np.arange(LENGTH)

    def side() -> Batch:
        ends = random.integers(PROMPT + 1, LENGTH, (ROWS, 1))
        answers = random.integers(1, 96, (ROWS, LENGTH - PROMPT))
        real = index < ends
        tokens = np.where(real, np.concatenate([asked, answers], axis=1), junk).astype(np.int32)
        places = np.where(real, index, -1).astype(np.int32)
        return Batch(tokens, real.astype(np.int32), places, real & (index >= PROMPT))

    return Pairs(side(), side())


def answer(model, text: Batch) -> np.ndarray:
    """Dense: the sum of log-probabilities of what follows the prompt, each of a row of its own without padding."""
    found = []
    for row, tokens in enumerate(text.tokens):
        alone = tokens[text.segments[row] > 0]
        scores = np.asarray(jax.nn.log_softmax(model(jnp.asarray(alone[None]))[0]), np.float64)
        found.append(sum(scores[place - 1, alone[place]] for place in range(PROMPT, len(alone))))
    return np.array(found)


@pytest.fixture(scope="module")
def preference():
    """The objective, compiled."""
    return jax.jit(Preference(LossSection(beta=BETA, chunk=16)))


def test_preferences_begin_at_log_two(preference):
    """The student as its stage begins is its own reference."""
    student, _ = models()
    loss, count, terms = preference(student, student, pairs())
    assert float(loss) == pytest.approx(np.log(2), rel=1e-6) and float(count) == ROWS
    assert float(terms["margin"]) == 0 and float(terms["preferred"]) == 0


def test_preferences_compare_answers_given_their_prompts(preference):
    """Tokens of prompts, and what pads a row, do not count."""
    (student, reference), text = models(), pairs()
    loss, _, terms = preference(student, reference, text)
    sides = [answer(student, side) - answer(reference, side) for side in (text.chosen, text.rejected)]
    margin = BETA * (sides[0] - sides[1])
    # Sums of some 20 float32 log-probabilities near 10.
    assert float(terms["margin"]) == pytest.approx(margin.mean(), abs=1e-4)
    assert float(loss) == pytest.approx(np.logaddexp(0, -margin).mean(), abs=1e-4)
    assert float(terms["preferred"]) == pytest.approx((margin > 0).mean())
    assert np.abs(margin).max() > 0.1, "a margin near 0 proves little"
    assert float(preference(student, reference, pairs(junk=7))[0]) == pytest.approx(float(loss), abs=1e-6)


@pytest.mark.slow
def test_preferences_move_the_student_alone():
    loss = Preference(LossSection(beta=BETA, chunk=16))
    both = jax.jit(jax.grad(lambda *given: loss(*given)[0], argnums=(0, 1)))
    found = both(*models(), jax.tree.map(jnp.asarray, pairs()))
    mine, theirs = (each.blocks[0].attention.qkv.kernel[...] for each in found)
    assert float(jnp.abs(mine).max()) > 0 and not np.any(theirs)
