"""Claims about D2O (Wan et al. 2024): layer budgets from variance, who merges into whom, and the pool."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.parts.amounts import Slots
from kvx.parts.losers import Drop
from kvx.parts.merging import MergeNearest
from kvx.parts.pool_up import ByVariance
from kvx.stores.dense import Dense
from tests.kvx.policies.direct import context, evidence, tokens
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.tiny import model, prompts


def concentration(column):
    """f of one layer from its column sums (G, R, S)."""
    spread = np.var(column, axis=-1, ddof=1)
    return np.mean((spread - spread.min()) / (spread.max() - spread.min() + 1e-6))


def whole_shares(concentrations, total):
    """Whole slots in proportion to softmax(-f), by largest remainder."""
    share = np.exp(-np.asarray(concentrations))
    exact = total * share / share.sum()
    floors = np.floor(exact).astype(int)
    order = np.argsort(-(exact - floors), kind="stable")
    floors[order[: total - floors.sum()]] += 1
    return floors


class Discriminative:
    """D2O in numpy, token by token, on a masked simulation; survivors' keys and values are overwritten in place."""

    def __init__(self, budget, recent, sinks, weights, acting, alpha=0.5):
        self.budget, self.recent, self.sinks, self.acting = budget, recent, sinks, acting
        self.weights, self.alpha, self.thresholds = weights, alpha, {}

    def prompt(self, layers):
        found = [concentration(layers[index].column) for index in self.acting]
        self.sizes = dict(zip(self.acting, whole_shares(found, len(self.acting) * self.budget), strict=True))
        for index in self.acting:
            self._shrink(index, layers[index])

    def step(self, index, layer):
        if index in self.acting:
            self._shrink(index, layer)

    def _shrink(self, index, layer):
        size, length = self.sizes[index], layer.alive.shape[1]
        recent = min(self.recent * size // self.budget, max(size - self.sinks, 0))
        place = np.arange(length)
        before = layer.alive.copy()
        for head in range(len(before)):
            score = np.where((place < self.sinks) | (place >= length - recent), np.inf, layer.mass[head])
            order = [each for each in np.argsort(-score, kind="stable") if before[head, each]]
            layer.alive[head, order[size:]] = False
        lost = np.argwhere(before & ~layer.alive)
        if not len(lost):
            return
        unit = layer.keys / np.linalg.norm(layer.keys, axis=-1, keepdims=True)
        likeness = np.where(layer.alive[:, None], np.einsum("gtd,gsd->gts", unit, unit), -np.inf)
        nearest, cosine = likeness.argmax(axis=-1), likeness.max(axis=-1)
        mean = np.mean([cosine[head, each] for head, each in lost])
        last = self.thresholds.get(index)
        self.thresholds[index] = mean if last is None else self.alpha * last + (1 - self.alpha) * mean
        for rows in (layer.keys, layer.values):
            original = rows.copy()
            for head, survivor in {(head, nearest[head, each]) for head, each in lost}:
                recalled = [
                    each for at, each in lost
                    if at == head and nearest[at, each] == survivor and cosine[at, each] >= self.thresholds[index]
                ]  # fmt: skip
                if recalled:
                    u = cosine[head, recalled]
                    weight = np.exp(u) if self.weights == "exp" else u
                    own, total = (np.e, np.e + weight.sum()) if self.weights == "exp" else (1, 1 + len(recalled))
                    rows[head, survivor] = (own * original[head, survivor] + weight @ original[head, recalled]) / total


@pytest.mark.sampled
@pytest.mark.parametrize("weights", ["exp", "mean"])
def test_kept_sets_logits_and_merged_rows_equal_a_masked_simulation(weights):
    prompt, _ = prompts(40)
    deep = model(num_hidden_layers=5)
    policy = policies.d2o(16, weights=weights, skip=(0, -1))
    oracle = Simulation(deep, prompt[0], Discriminative(16, 8, 4, weights, [1, 2, 3]))
    assert len(set(oracle.rule.sizes.values())) > 1
    _, cache = kvx.prefill(deep, prompt, policy, max_new_tokens=16)
    assert kept_by(cache) == oracle.kept()
    for token in range(10, 20):
        logits, cache = kvx.decode_step(deep, np.asarray([token]), cache, policy)
        # float32 against float64 over five layers, with rows that were merged several times.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=5e-4)
        assert kept_by(cache) == oracle.kept()
    for index in oracle.rule.acting:
        keys, values, places = (np.asarray(array)[0] for array in cache.layers[index].dense())
        for head in range(2):
            held = places[head] >= 0
            layer = oracle.layers[index]
            np.testing.assert_allclose(keys[head][held], layer.keys[head, places[head][held]], atol=1e-3)
            np.testing.assert_allclose(values[head][held], layer.values[head, places[head][held]], atol=1e-3)


def test_golden_ratios():
    """f = [0.2, 0.5, 0.1, 0.4] at a fifth of the prompt: r = [0.2183, 0.1617, 0.2413, 0.1787]."""
    spec, lengths = context(10_000).spec, jnp.asarray([10_000], jnp.int32)
    measures = [jnp.asarray([f]) for f in (0.2, 0.5, 0.1, 0.4)]
    sizes = np.stack(ByVariance(Slots(2000)).allocate(measures, spec, lengths, lengths))[:, 0]
    assert sizes.sum() == 8000
    np.testing.assert_allclose(sizes / 10_000, [0.2183, 0.1617, 0.2413, 0.1787], atol=1e-4)


@pytest.mark.slow
def test_a_budget_that_just_holds_prompt_and_answer_is_the_full_cache():
    """Layers of unlike concentration ask for unlike shares, but none can take more than there will be tokens."""
    text, lengths = prompts(70, 41)
    answer = np.random.default_rng(3).integers(0, 97, (2, 9)).astype(np.int32)
    scores = []
    for policy in (policies.full(), policies.d2o(budget=79, skip=())):
        logits, cache = kvx.prefill(model(num_hidden_layers=3), text, policy, lengths, max_new_tokens=9)
        found, _ = kvx.teacher_forced(model(num_hidden_layers=3), answer, cache, policy, logits)
        scores.append(np.asarray(found))
    np.testing.assert_allclose(scores[1], scores[0], atol=2e-4)


def test_equal_layers_get_equal_budgets():
    spec, lengths = context(100).spec, jnp.asarray([100], jnp.int32)
    sizes = ByVariance(Slots(20)).allocate([jnp.asarray([0.3])] * 5, spec, lengths, lengths)
    np.testing.assert_array_equal(np.stack(sizes)[:, 0], 20)


def test_concentration_is_the_normalised_variance_of_column_mass():
    column = np.random.default_rng(0).exponential(size=(2, 3, 30))
    found = ByVariance(Slots(8)).measure(tokens(2, 30), evidence(30, columns=column))
    np.testing.assert_allclose(found, [concentration(column)], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recent", [0.5, 0.9, 10])
def test_every_layer_holds_exactly_its_slots_and_sees_every_fresh_token(recent):
    """Also where a layer gets fewer slots than the average layer's sinks and recent tokens."""
    prompt, _ = prompts(60, seed=3)
    policy = policies.d2o(20 if recent == 0.9 else 16, recent=recent, sinks=2, skip=())
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=8)
    sizes = [[len(head) for head in heads] for heads in kept_by(cache)]
    assert sum(heads[0] for heads in sizes) == 4 * (20 if recent == 0.9 else 16)
    assert len({heads[0] for heads in sizes}) > 1
    for seen in range(60, 66):
        held = kept_by(cache)
        assert [[len(head) for head in heads] for heads in held] == sizes
        assert all({0, 1, seen - 1} <= set(head) for heads in held for head in heads)
        _, cache = kvx.decode_step(model(), np.asarray([7]), cache, policy)


def test_the_pool_is_one_storage_of_the_conserved_total():
    prompt, _ = prompts(60)
    _, cache = kvx.prefill(model(), prompt, policies.d2o(20, skip=(0,)), max_new_tokens=8)
    assert len(cache.storage) == 2  # the skipped layer's own, and the pool
    slots = -(-3 * 21 // 16) * 16  # one spare slot a layer, rounded up once
    assert cache.storage[1].slots.shape == (1, 2, slots)


def settled(losers, keys, values, kept):
    """Tokens of one head after the prompt, and the threshold."""
    some, mask = tokens(1, len(keys), keys=[keys], values=[values]), jnp.asarray(kept)[None, None]
    after, (threshold, _) = losers.settle(some, mask, ~mask, evidence(len(keys)), context(len(keys)))
    return np.asarray(after.keys)[0, 0], np.asarray(after.values)[0, 0], float(threshold[0])


KEYS = np.array([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0.6, 0.8, 0]], np.float32)
VALUES = np.arange(16, dtype=np.float32).reshape(4, 4)


def test_an_evicted_key_equal_to_a_kept_one_averages_their_values():
    keys, values, threshold = settled(MergeNearest(), KEYS, VALUES, [True, False, True, True])
    assert threshold == pytest.approx(1)
    np.testing.assert_allclose(keys[0], KEYS[0], atol=1e-6)
    np.testing.assert_allclose(values[0], VALUES[:2].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(keys[2:], KEYS[2:])
    np.testing.assert_array_equal(values[2:], VALUES[2:])


@pytest.mark.parametrize("weights", ["exp", "mean"])
def test_only_losers_above_the_mean_likeness_are_recalled(weights):
    # Token 1 resembles token 0 (u = 1), token 3 resembles token 2 (u = 0.6); the threshold is 0.8.
    keys, values, threshold = settled(MergeNearest(weights=weights), KEYS, VALUES, [True, False, True, False])
    assert threshold == pytest.approx(0.8)
    np.testing.assert_allclose(values[0], VALUES[:2].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(keys[2], KEYS[2])
    np.testing.assert_array_equal(values[2], VALUES[2])


def test_weights_of_the_paper_and_of_its_code():
    likeness = 0.6
    keys = KEYS[[2, 3, 0]]
    for weights, own, other, total in (
        ("exp", np.e, np.exp(likeness), np.e + np.exp(likeness)),
        ("mean", 1, likeness, 2),
    ):
        found, values, _ = settled(MergeNearest(weights=weights), keys, VALUES[:3], [True, False, True])
        np.testing.assert_allclose(found[0], (own * keys[0] + other * keys[1]) / total, atol=1e-6)
        np.testing.assert_allclose(values[0], (own * VALUES[0] + other * VALUES[1]) / total, atol=1e-5)


def one_store(heads=2, length=12, seed=0):
    return Dense.pack(tokens(heads, length, seed=seed), jnp.ones((1, heads, length), bool), 16)


@pytest.mark.parametrize("weights", ["exp", "mean"])
def test_above_one_the_threshold_recalls_nobody_and_the_step_is_a_drop(weights):
    store, scores = one_store(), jnp.asarray(np.random.default_rng(1).uniform(size=(1, 2, 16)), jnp.float32)
    excess = jnp.asarray([[1, 0]], jnp.int32)
    state = jnp.asarray([2.0]), jnp.asarray([True])
    merged, _ = MergeNearest(alpha=1.0, weights=weights).step(store, state, scores, excess, 1, context(8))
    dropped, _ = Drop().step(store, None, scores, excess, 1, context(8))
    for ours, theirs in zip(merged.dense(), dropped.dense(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_without_merging_it_is_h2o_with_four_sinks_and_these_budgets():
    prompt, _ = prompts(40)
    policy = policies.d2o(16, skip=())
    evict, pool = policy.stages
    silent = replace(policy, stages=(replace(evict, losers=Drop()), pool))
    oracle = Simulation(model(), prompt[0], Discriminative(16, 8, 4, "exp", [0, 1, 2, 3]))
    _, cache = kvx.prefill(model(), prompt, silent, max_new_tokens=8)
    assert kept_by(cache) == oracle.kept()  # at the prompt, merging changes nothing about who stays
    hitters = policies.h2o(16, recent=8)
    _, reference = kvx.prefill(model(), prompt, hitters, max_new_tokens=8)
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        own, other = (
            dict(zip(np.asarray(each.positions())[0, 0].tolist(), np.asarray(each.stats["mass"])[0, 0], strict=True))
            for each in (ours, theirs)
        )
        common = (own.keys() & other.keys()) - {-1}
        assert len(common) > 8
        np.testing.assert_array_equal([own[place] for place in common], [other[place] for place in common])


def test_the_threshold_is_a_moving_average_that_rows_without_losers_keep():
    store, scores = one_store(heads=1), jnp.zeros((1, 1, 16), jnp.float32)
    losers = MergeNearest(alpha=0.75)
    first = jnp.asarray([0.5]), jnp.asarray([True])
    _, (kept, _) = losers.step(store, first, scores, jnp.asarray([[0]], jnp.int32), 1, context(8))
    assert float(kept[0]) == 0.5
    _, (moved, _) = losers.step(store, first, scores, jnp.asarray([[1]], jnp.int32), 1, context(8))
    keys = np.asarray(store.keys)[0, 0, :12]
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    likeness = (unit[:11] @ unit[11]).max()  # equal scores: the newest leaves
    assert float(moved[0]) == pytest.approx(0.75 * 0.5 + 0.25 * likeness, rel=1e-5)


def test_zero_keys_and_lonely_tokens_do_not_poison_the_threshold():
    keys, values, threshold = settled(MergeNearest(), np.zeros((3, 4)), VALUES[:3], [True, False, True])
    assert np.isfinite([*keys.ravel(), *values.ravel(), threshold]).all()
    for weights in ("exp", "mean"):
        alone = one_store(heads=1, length=1)
        state = jnp.asarray([0.3]), jnp.asarray([True])
        store, (kept, _) = MergeNearest(weights=weights).step(
            alone, state, jnp.zeros((1, 1, 16)), jnp.asarray([[1]], jnp.int32), 1, context(8)
        )
        assert float(kept[0]) == pytest.approx(0.3)
        assert np.isfinite(np.asarray(store.keys)).all()
        assert (np.asarray(store.slots) == -1).all()
