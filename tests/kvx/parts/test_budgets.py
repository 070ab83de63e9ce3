"""Claims about budgets over layers and heads that hold whatever the method."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from kvx import policies
from kvx.errors import BadInput
from kvx.parts.amounts import Share, Slots
from kvx.parts.budgets import Compete, Pyramid, Uniform, check_protected
from kvx.parts.pool_up import ByVariance
from tests.kvx.policies.direct import context

LENGTHS = jnp.asarray([5, 40, 100], jnp.int32)


def batch(layer=0, layers=4, prompt=100):
    return replace(context(prompt, layer, layers), lengths=LENGTHS)


def counts(budget, where, scores=None):
    scores = jnp.zeros((3, 2, 100)) if scores is None else scores
    mask = jnp.broadcast_to(jnp.arange(100) < LENGTHS[:, None, None], scores.shape)
    return np.asarray(budget.counts(scores, mask, where))


def test_uniform_slots_are_the_same_for_every_row_and_shares_follow_its_length():
    np.testing.assert_array_equal(counts(Uniform(Slots(8)), batch()), np.full((3, 2), 8))
    np.testing.assert_array_equal(counts(Uniform(Share(0.25)), batch())[:, 0], [1, 10, 25])


def test_a_policy_never_keeps_more_slots_than_the_prompt_has():
    spec = batch().spec
    for policy in (policies.h2o(500), policies.snapkv(500, window=8), policies.pyramidkv(500, window=8)):
        assert policy.capacity(spec, 0) == spec.prompt


@pytest.mark.parametrize("amount", [Slots(24), Share(0.3)])
def test_the_pyramid_conserves_its_total_in_every_row(amount):
    layers = [counts(Pyramid(amount, 4), batch(layer)) for layer in range(4)]
    budgets = np.maximum(np.asarray(amount.of(LENGTHS, 100)), 4)  # the window wins in a short row
    np.testing.assert_array_equal(np.sum(layers, axis=0)[:, 0], 4 * budgets)


def test_traced_and_static_pyramids_agree():
    budget = Pyramid(Slots(24), 4)
    table = budget.table(np.asarray(LENGTHS), np.full(3, 24), 4, np)
    for layer in range(4):
        np.testing.assert_array_equal(counts(budget, batch(layer))[:, 0], table[layer])


def test_competing_heads_conserve_the_total_of_every_row_that_has_as_many():
    scores = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 2, 100)), jnp.float32)
    found = counts(Compete(Slots(8)), batch(), scores)
    np.testing.assert_array_equal(found.sum(axis=1), [10, 16, 16])  # the first row has five tokens a head
    assert np.all(found >= 1)


def test_layers_split_by_variance_conserve_the_total_and_cap_short_rows():
    spec = batch().spec
    measures = [jnp.asarray([0.1, 0.9, 0.3]) * scale for scale in (0.2, 0.5, 1.0, 0.0)]
    sizes = np.stack(ByVariance(Slots(30)).allocate(measures, spec, LENGTHS, LENGTHS + 7))
    caps = np.asarray(LENGTHS) + 7
    np.testing.assert_array_equal(sizes.sum(axis=0), np.minimum(4 * 30, 4 * caps))
    assert np.all(sizes <= caps)
    assert np.all(sizes <= ByVariance(Slots(30)).capacity(spec, 0))


def test_a_budget_below_its_protected_slots_is_refused_and_a_share_is_not():
    with pytest.raises(BadInput, match=r"budget=7 is smaller .* \(window=8\); allowed: at least 8"):
        check_protected(Slots(7), 8, "window=8")
    check_protected(Slots(8), 8, "window=8")
    check_protected(Share(0.01), 8, "window=8")
