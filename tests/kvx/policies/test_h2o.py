"""Claims about H2O (Zhang et al. 2023): the paper's sum against a masked simulation, conservation, hand cases."""

import numpy as np
import pytest

import kvx
from kvx import policies
from tests.kvx.policies.direct import context, evidence, kept, tokens
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.tiny import model, prompts


class HeavyHitters:
    """Algorithm 1 of the paper, by head: the lowest sum (or mean) outside the recent window leaves."""

    def __init__(self, budget, recent, average="sum"):
        self.budget, self.recent, self.average = budget, recent, average

    def prompt(self, layers):
        for layer in layers:
            while layer.alive[0].sum() > self.budget:
                self._evict(layer)

    def step(self, index, layer):
        if layer.alive[0].sum() > self.budget:
            self._evict(layer)

    def _evict(self, layer):
        length = layer.alive.shape[1]
        score = layer.mass / (length - np.arange(length)) if self.average == "mean" else layer.mass
        score = np.where(layer.alive & (np.arange(length) < length - self.recent), score, np.inf)
        layer.alive[np.arange(len(score)), score.argmin(axis=1)] = False


@pytest.mark.parametrize("average", ["sum", "mean"])
def test_kept_sets_and_logits_equal_the_masked_simulation(average):
    prompt, _ = prompts(24)
    policy = policies.h2o(12, recent=4, average=average)
    oracle = Simulation(model(), prompt[0], HeavyHitters(12, 4, average))
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=16)
    assert kept_by(cache) == oracle.kept()
    for token in range(10, 22):
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        # float32 against float64 over four layers.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=2e-4)
        assert kept_by(cache) == oracle.kept()


def test_mass_is_conserved_until_something_leaves():
    prompt, _ = prompts(20)
    policy = policies.h2o(64)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=8)
    for seen in range(20, 24):
        for store in cache.layers:
            # Every query hands out a probability of one, whatever the head.
            held = np.where(np.asarray(store.positions()) >= 0, store.stats["mass"], 0)
            np.testing.assert_allclose(held.sum(axis=-1), seen, rtol=1e-5)
        _, cache = kvx.decode_step(model(), np.asarray([3]), cache, policy)


COLUMNS = np.array([[[1.9, 0.7, 0.4]]])
"""Column sums of the rows [1], [.4, .6], [.5, .1, .4]."""


def choose(policy, columns=COLUMNS):
    length = columns.shape[-1]
    return kept(policy, tokens(len(columns), length), evidence(length, columns=columns), context(length))


def test_one_heavy_hitter_and_one_recent_token_of_three():
    np.testing.assert_array_equal(choose(policies.h2o(2, recent=1)), [[True, False, True]])


def test_without_a_recent_window_only_the_mass_decides():
    np.testing.assert_array_equal(choose(policies.h2o(2, recent=0)), [[True, True, False]])


def test_with_nothing_but_recent_tokens_it_is_a_window():
    columns = np.random.default_rng(0).uniform(size=(2, 1, 9))
    mask = choose(policies.h2o(4, recent=4), columns)
    np.testing.assert_array_equal(mask, np.broadcast_to(np.arange(9) >= 5, (2, 9)))


def test_the_mean_divides_by_the_queries_that_could_see_a_token():
    # 1.9 / 3, 0.7 / 2, 0.4 / 1: the mean no longer favours the old.
    np.testing.assert_array_equal(choose(policies.h2o(2, recent=0, average="mean")), [[True, False, True]])


def test_the_sum_over_a_group_keeps_what_the_mean_keeps_and_the_maximum_may_not():
    columns = np.array([[[3.0, 0.0, 1.0], [0.0, 2.5, 1.0]]])
    means, sums, tops = (choose(policies.h2o(1, recent=0, group=group), columns) for group in ("mean", "sum", "max"))
    np.testing.assert_array_equal(means, sums)
    np.testing.assert_array_equal(tops, [[True, False, False]])
    columns = np.array([[[3.0, 0.0, 2.0], [0.0, 2.5, 2.0]]])
    np.testing.assert_array_equal(choose(policies.h2o(1, recent=0), columns), [[False, False, True]])
    np.testing.assert_array_equal(choose(policies.h2o(1, recent=0, group="max"), columns), [[True, False, False]])


def test_equal_masses_keep_the_lower_position():
    np.testing.assert_array_equal(choose(policies.h2o(2, recent=0), np.ones((1, 1, 4))), [[True, True, False, False]])
