"""Claims about CaM (Zhang et al. 2024): a dense simulation with the same coins, conservation, expectation, edges."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.parts.chance import uniforms
from kvx.parts.losers import Drop
from kvx.parts.merge_forward import FLOW, MergeForward, merge_probability
from kvx.stores.dense import Dense
from tests.kvx.policies.direct import context, tokens
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.tiny import model, prompts


class Merging:
    """Sinks and the newest, or sinks, the newest and the heaviest; whoever leaves merges forward."""

    def __init__(self, budget, width, every=1, sinks=2, recent=1, heavy=False, seed=0):
        self.budget, self.width, self.every, self.sinks = budget, width, every, sinks
        self.recent, self.heavy, self.seed, self.merges = recent, heavy, seed, 0

    def prompt(self, layers):
        self.flow = [np.zeros_like(layer.mass) for layer in layers]
        for layer in layers:
            for head, leaving in enumerate(self._victims(layer, 1)):
                layer.alive[head, leaving] = False

    def step(self, index, layer):
        self.flow[index] = np.pad(self.flow[index], ((0, 0), (0, 1))) + layer.last.mean(axis=1)
        for head, leaving in enumerate(self._victims(layer, self.every)):
            layer.alive[head, leaving] = False
            values = layer.values[head].copy()
            for victim in leaving:
                after = np.flatnonzero(layer.alive[head] & (np.arange(len(values)) > victim))[: self.width]
                own, mean = self.flow[index][head, victim], self.flow[index][head, after].mean()
                places = jnp.full((1, len(layer.alive), 1), victim, jnp.int32)
                coin = float(uniforms(self.seed, jnp.int32(index), places)[0, head, 0])
                if coin < min(own / mean, 1.0):
                    values[after] += layer.values[head, victim] / len(after)
                    self.merges += 1
            layer.values[head] = values

    def _victims(self, layer, every):
        length = layer.alive.shape[1]
        places = np.arange(length)
        score = layer.mass if self.heavy else np.broadcast_to(places, layer.mass.shape)
        free = layer.alive & (places >= self.sinks) & (places < length - self.recent)
        for head in range(len(free)):
            excess = layer.alive[head].sum() - self.budget
            order = sorted(np.flatnonzero(free[head]), key=lambda place: (score[head, place], -place))
            yield sorted(order[:excess]) if excess >= every else []


CASES = {
    "recency": ({}, {}),
    "narrow": ({"width": 1}, {"width": 1}),
    "other coins": ({"seed": 5}, {"seed": 5}),
    "three at once": ({"every": 3}, {"every": 3}),
    "h2o": ({"host": "h2o", "recent": 4}, {"heavy": True, "recent": 4}),
    "h2o, three at once": ({"host": "h2o", "recent": 4, "every": 3}, {"heavy": True, "recent": 4, "every": 3}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_kept_sets_and_logits_equal_the_dense_simulation(name):
    prompt, _ = prompts(24)
    ours, theirs = ({"width": 4, "sinks": 2} | each for each in CASES[name])
    policy, rule = policies.cam(12, **ours), Merging(12, **theirs)
    oracle = Simulation(model(), prompt[0], rule)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=16)
    assert kept_by(cache) == oracle.kept()
    for token in range(10, 25):
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        # float32 against float64 over four layers.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=2e-4)
        assert kept_by(cache) == oracle.kept()
    # Not all coins fall the same way, or the test would not know a merge from an eviction.
    evicted = 15 * 2 * 4
    assert 0 < rule.merges < evicted


def test_merging_changes_nothing_about_who_stays():
    prompt, _ = prompts(24)
    pair = policies.cam(12, width=4), policies.streaming_llm(12, renumber=False)
    _, caches = kvx.prefill(model(), prompt, pair, max_new_tokens=16)
    caches = list(caches)
    for token in range(8):
        for index, policy in enumerate(pair):
            _, caches[index] = kvx.decode_step(model(), np.asarray([token]), caches[index], policy)
    assert kept_by(caches[0]) == kept_by(caches[1])
    # The first layer's keys do not know about values: bit-identical, and its values are not.
    merged, evicted = (cache.layers[0] for cache in caches)
    there = np.asarray(merged.positions()) >= 0
    np.testing.assert_array_equal(np.asarray(merged.keys)[there], np.asarray(evicted.keys)[there])
    assert np.abs(np.asarray(merged.values)[there] - np.asarray(evicted.values)[there]).max() > 1e-3


ORDER = np.array([7, 2, 9, 0, 4, 8, 1, 5])
"""Positions by slot: reused slots are not in the order of the text."""


def store(flow, heads=1, dtype=jnp.float32, order=ORDER):
    """A store of one row, one empty slot among the tokens."""
    some = tokens(heads, len(order) + 1)
    positions = np.insert(order, 3, -1).astype(np.int32)
    flow = np.broadcast_to(np.insert(np.asarray(flow, np.float32), 3, 50.0), (1, heads, len(positions)))
    return Dense(
        some.keys.astype(dtype),
        some.values.astype(dtype),
        jnp.broadcast_to(jnp.asarray(positions), (1, heads, len(positions))),
        some.rotary,
        {FLOW: jnp.asarray(flow)},
    )


def let_go(before, victims, width, most=None, seed=0):
    """The store after these positions have left."""
    places = before.positions()
    scores = jnp.where(jnp.isin(places, jnp.asarray(victims)), 0.0, 1.0)
    excess = jnp.full(places.shape[:2], len(victims), jnp.int32)
    where, count = context(10, heads=places.shape[1]), most or len(victims)
    losers = MergeForward(width, count, seed)
    after, waiting = losers.step(before, None, scores, excess, count, where)
    after, waiting = losers.before(after, waiting, where)
    again, _ = losers.before(after, waiting, where)
    np.testing.assert_array_equal(again.values, after.values)  # it happens once
    return after


def held(after):
    """Values by position, of the first head."""
    return {
        int(place): np.asarray(after.values)[0, 0, slot] for slot, place in enumerate(after.slots[0, 0]) if place >= 0
    }


def test_a_probability_of_zero_is_the_base_policy():
    flow = np.where(ORDER == 2, 0.0, 1.0)
    before = store(flow)
    after = let_go(before, [2], width=3)
    scores = jnp.where(before.positions() == 2, 0.0, 1.0)
    dropped, _ = Drop().step(before, None, scores, jnp.ones((1, 1), jnp.int32), 1, context(10))
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(dropped), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_with_a_width_of_one_the_mass_moves_to_the_next():
    before = store(np.ones(8))
    old, new = held(before), held(let_go(before, [2], width=1))
    np.testing.assert_allclose(new[4], old[4] + old[2], rtol=1e-6)
    for place in (0, 1, 5, 7, 8, 9):
        np.testing.assert_array_equal(new[place], old[place])


@pytest.mark.sampled
@pytest.mark.parametrize(("victims", "width"), [([2], 3), ([8], 3), ([1, 2], 3), ([1, 4, 5], 2), ([0, 8, 7], 32)])
def test_what_leaves_under_equal_attention_is_kept_by_the_others(victims, width):
    """rho = 1: the sum of all values is conserved, however few there are to take them, and keys are untouched."""
    before = store(np.full(8, 0.3), heads=3)
    after = let_go(before, victims, width)
    there, was = (np.asarray(each.positions()) >= 0 for each in (after, before))
    sums = [np.where(mask[..., None], each.values, 0).sum(axis=2) for each, mask in ((after, there), (before, was))]
    np.testing.assert_allclose(*sums, atol=1e-5)
    np.testing.assert_array_equal(after.keys, before.keys)
    np.testing.assert_array_equal(after.stats[FLOW], before.stats[FLOW])
    # Each value goes in equal parts to the next of the kept.
    old, new = held(before), held(after)
    expected = {place: old[place].astype(np.float64) for place in new}
    for victim in victims:
        window = sorted(place for place in new if place > victim)[:width]
        for place in window:
            expected[place] += old[victim] / len(window)
    for place, value in expected.items():
        np.testing.assert_allclose(new[place], value, atol=1e-6)


def test_the_newest_has_nobody_to_go_to():
    before = store(np.ones(8))
    old, new = held(before), held(let_go(before, [9], width=4))
    assert 9 not in new
    for place, value in new.items():
        np.testing.assert_array_equal(value, old[place])


def test_fewer_may_leave_than_could():
    before = store(np.ones(8))
    one, several = let_go(before, [2], 3), let_go(before, [2], 3, most=4)
    for place, value in held(one).items():
        np.testing.assert_allclose(held(several)[place], value, rtol=1e-6)
    nobody = let_go(before, [], 3, most=4)
    for place, value in held(before).items():
        np.testing.assert_array_equal(held(nobody)[place], value)


def test_the_expected_gift_is_the_probability_times_the_share():
    """4096 heads hold the same tokens; A_i / mean A_J = 0.3."""
    heads = 4096
    before = store(np.where(ORDER == 2, 0.3, 1.0), heads=1)
    wide = jax.tree.map(lambda leaf: jnp.repeat(leaf, heads, axis=1) if jnp.ndim(leaf) > 2 else leaf, before)
    after = let_go(wide, [2], width=3)
    slot = int(np.flatnonzero(np.asarray(before.slots)[0, 0] == 4)[0])
    victim = held(before)[2]
    gifts = np.asarray(after.values)[0, :, slot] - np.asarray(before.values)[0, 0, slot]
    given = gifts @ victim / (victim @ victim) * 3
    # Every head gives a third of the value, or nothing.
    np.testing.assert_allclose(np.minimum(np.abs(given), np.abs(given - 1)), 0, atol=1e-4)
    assert abs(given.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / heads)


def test_equal_logits_keep_the_numerator():
    """If the next query sees i and all of J alike, sum p v loses nothing but i's part of the denominator."""
    before = store(np.ones(8))
    after = let_go(before, [2], width=2)
    weights = {place: 0.5 if place in (2, 4, 5) else 0.1 * place for place in held(before)}
    totals = [sum(weights[place] * value for place, value in held(each).items()) for each in (before, after)]
    np.testing.assert_allclose(*totals, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_several_gifts_are_summed_before_they_are_rounded():
    """bfloat16: 64 values of 1/8 of the last place each would all be lost one by one."""
    order = np.arange(66)
    before = store(np.ones(66), dtype=jnp.bfloat16, order=order)
    values = jnp.where((before.slots == 65)[..., None], 1.0, 2.0**-10).astype(jnp.bfloat16)
    after = let_go(replace(before, values=values), list(range(1, 65)), width=8)
    np.testing.assert_allclose(held(after)[65].astype(np.float32), 1 + 2.0**-4)


@pytest.mark.parametrize(("own", "mean", "expected"), [(0, 0, 0), (2, 0, 1), (0, 2, 0), (1, 4, 0.25), (3, 2, 1)])
def test_probabilities_at_the_edges(own, mean, expected):
    assert merge_probability(jnp.float32(own), jnp.float32(mean)) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: policies.cam(4), "budget=4 is smaller than its protected slots"),
        (lambda: policies.cam(64, host="tova"), "host='tova' is not offered"),
        (lambda: policies.cam(64, width=0), "width=0 is out of range"),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(kvx.BadInput, match=message):
        build()
