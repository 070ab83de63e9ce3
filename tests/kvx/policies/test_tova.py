"""Claims about TOVA (Oren et al. 2024): the newest query alone decides, for all heads of a layer together."""

import numpy as np
import pytest

import kvx
from kvx import policies
from tests.kvx.policies.direct import context, evidence, kept, tokens
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.tiny import model, prompts


class LeastAttended:
    """The lowest probability of the newest query leaves; "layer": mean over all query heads, one set for all."""

    def __init__(self, budget, across):
        self.budget, self.across = budget, across

    def prompt(self, layers):
        for layer in layers:
            while layer.alive[0].sum() > self.budget:
                self._evict(layer)

    def step(self, index, layer):
        if layer.alive[0].sum() > self.budget:
            self._evict(layer)

    def _evict(self, layer):
        score = layer.last.mean(axis=1)
        if self.across == "layer":
            score = np.broadcast_to(score.mean(axis=0), score.shape)
        score = np.where(layer.alive, score, np.inf)
        layer.alive[np.arange(len(score)), score.argmin(axis=1)] = False


@pytest.mark.parametrize("across", ["layer", "head"])
def test_kept_sets_and_logits_equal_the_masked_simulation_and_are_nested(across):
    prompt, _ = prompts(24)
    policy = policies.tova(10, across=across)
    oracle = Simulation(model(), prompt[0], LeastAttended(10, across))
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=16)
    before = kept_by(cache)
    assert before == oracle.kept()
    for step, token in enumerate(range(40, 50)):
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=2e-4)  # float32 against float64
        after = kept_by(cache)
        assert after == oracle.kept()
        for layer, heads in enumerate(after):
            assert across == "head" or all(head == heads[0] for head in heads)
            for head, places in enumerate(heads):
                assert set(places) <= {*before[layer][head], 24 + step}
        before = after


ROWS = np.array([[[[0.5, 0.1, 0.4]]], [[[0.2, 0.5, 0.3]]]])
"""Last rows of two KV heads with one query head each."""


def choose(policy, rows=ROWS):
    length = rows.shape[-1]
    return kept(policy, tokens(len(rows), length), evidence(length, rows=rows), context(length))


def test_the_mean_over_heads_drops_the_middle_token():
    # 0.35, 0.30, 0.35
    np.testing.assert_array_equal(choose(policies.tova(2)), [[True, False, True]] * 2)


def test_head_by_head_each_drops_its_own():
    np.testing.assert_array_equal(choose(policies.tova(2, across="head")), [[True, False, True], [False, True, True]])


def test_the_newest_token_may_leave_unless_it_is_protected():
    rows = np.array([[[[0.5, 0.4, 0.1]]]])
    np.testing.assert_array_equal(choose(policies.tova(2), rows), [[True, True, False]])
    np.testing.assert_array_equal(choose(policies.tova(2, recent=1), rows), [[True, False, True]])
