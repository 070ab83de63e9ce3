"""Claims about CAKE (Qin et al. 2025): the cascade against a numpy one, nested cuts, conserved totals, memory."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.buckets import round_up
from kvx.cache import ENDLESS
from kvx.cache_builder import _ascend
from kvx.chain import chain
from kvx.context import Context, Spec
from kvx.evidence import Evidence
from tests.kvx.policies.direct import attention, context, evidence, kept, tokens
from tests.kvx.policies.masked_simulation import Simulation, kept_by
from tests.tiny import CONFIG, model, prompts

WINDOW, GAMMA = 4, 200.0


def water_filled(weights, total, caps):
    """Whole numbers in proportion to the weights, under the caps, by largest remainder; bisection on the level."""
    total, caps = min(total, int(caps.sum())), caps.astype(float)
    low, high = 0.0, total / weights[weights > 0].min() + 1
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(level * weights, caps).sum() < total else (low, level)
    exact = np.minimum(high * weights, caps)
    counts = np.floor(exact + 1e-9).astype(int)
    for place in np.lexsort((np.arange(len(exact)), -(exact - counts)))[: total - counts.sum()]:
        counts[place] += 1
    return counts


def pooled(scores, kernel=5):
    """Mean of the neighbours, zeros beyond the ends."""
    wide = np.pad(scores, ((0, 0), (kernel // 2, kernel // 2)))
    return np.stack([wide[:, at : at + scores.shape[1]] for at in range(kernel)]).mean(axis=0)


class Cascade:
    """The sheet's cascade over whole attention maps, budgets never growing; one out per step by the newest row."""

    def __init__(self, budget, tau1=1.0, tau2=1.0):
        self.budget, self.taus = budget, (1 / tau1, 1 / tau2)
        self.history = []

    def prompt(self, layers):
        total = (self.budget - WINDOW) * len(layers)
        outside = layers[0].alive.shape[1] - WINDOW
        preferences, indicators, self.counts = [], [], np.zeros(0, int)
        for layer in layers:
            rows = layer.rows[:, :, -WINDOW:, :outside]
            spread = -(rows * np.log(rows + 1e-10)).sum()
            moves = rows.var(axis=2, ddof=1).sum()
            preferences.append(spread ** self.taus[0] * moves ** self.taus[1])
            indicators.append(pooled((rows.mean(axis=2) + GAMMA * rows.var(axis=2, ddof=1)).mean(axis=1)))
            self.counts = water_filled(np.array(preferences), total, np.append(self.counts, outside))
            self.history.append(self.counts)
            for seen, indicator, count in zip(layers, indicators, self.counts, strict=False):
                scores = np.where(seen.alive[:, :outside], indicator, -1.0)
                order = np.argsort(-scores, axis=1, kind="stable")
                seen.alive[:, :outside] = False
                np.put_along_axis(seen.alive[:, :outside], order[:, :count], True, axis=1)

    def step(self, index, layer):
        old = layer.alive.copy()
        old[:, -WINDOW:] = False
        for head, alive in enumerate(layer.alive):
            held = np.flatnonzero(alive)
            votes = np.where(old[head, held], layer.last.mean(axis=1)[head, held], 0.0)
            smooth = np.where(old[head, held], pooled(votes[None])[0], np.inf)
            if len(held) > self.counts[index] + WINDOW:
                # Of equals the later goes.
                alive[held[len(held) - 1 - np.argmin(smooth[::-1])]] = False


@pytest.mark.sampled
@pytest.mark.parametrize("taus", [(1.0, 1.0), (1.6, 0.4)])
def test_kept_sets_and_logits_equal_the_masked_simulation(taus):
    prompt, _ = prompts(40)
    policy = policies.cake(13, window=WINDOW, tau1=taus[0], tau2=taus[1])
    rule = Cascade(13, *taus)
    oracle = Simulation(model(), prompt[0], rule)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=16)
    assert len(set(rule.counts)) > 1, "layers differ"
    assert kept_by(cache) == oracle.kept()
    for token in range(10, 24):
        logits, cache = kvx.decode_step(model(), np.asarray([token]), cache, policy)
        # float32 against float64 over four layers.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=2e-4)
        assert kept_by(cache) == oracle.kept()


def random_rows(layers, length, seed=0, heads=2):
    """Window rows (L, G, R, W, S) of random attention, causal, sharper in some layers."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((layers, heads, 2, WINDOW, length)) * random.uniform(0.3, 3, (layers, 1, 1, 1, 1))
    late = np.arange(length) > length - WINDOW + np.arange(WINDOW)[:, None]
    weights = np.where(late, 0, np.exp(logits))
    return weights / weights.sum(axis=-1, keepdims=True)


def climbed(policy, rows):
    """What the layers so far hold after each arrival: counts (L,), and kept positions by layer and head."""
    (stage,), carry = policy.stages, None
    for layer, seen in enumerate(rows):
        heads, length = seen.shape[0], seen.shape[-1]
        some = tokens(heads, length, seed=layer)
        where = context(length, layer, len(rows), heads)
        carry = stage.ascend(carry, some, evidence(length, rows=seen), where)
        stores = [stage.land(carry, context(length, done, len(rows), heads))[0] for done in range(layer + 1)]
        for done, store in enumerate(stores):
            # Keys and values moved with their positions.
            original, held = tokens(heads, length, seed=done), store.tokens()
            for head in range(heads):
                at = np.asarray(held.positions[0, head])
                np.testing.assert_array_equal(held.keys[0, head][at >= 0], original.keys[0, head][at[at >= 0]])
                np.testing.assert_array_equal(held.values[0, head][at >= 0], original.values[0, head][at[at >= 0]])
        yield (
            np.asarray(carry.counts)[0],
            [[set(head[head >= 0].tolist()) for head in np.asarray(store.positions())[0]] for store in stores],
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_cuts_are_nested_and_every_arrival_holds_the_total_exactly(seed):
    layers, length, budget = 6, 50, 11
    total, before = (budget - WINDOW) * layers, []
    for counts, sets in climbed(policies.cake(budget, window=WINDOW), random_rows(layers, length, seed)):
        arrived = len(sets)
        assert counts.sum() == min(total, arrived * (length - WINDOW))
        for count, layer in zip(counts, sets, strict=False):
            assert all(len(head) == count + WINDOW for head in layer)
            assert all(set(range(length - WINDOW, length)) <= head for head in layer)
        for old, new in zip(before, sets, strict=False):
            assert all(after <= head for head, after in zip(old, new, strict=True))
        before = sets
    assert len({len(layer[0]) for layer in before}) > 1, "layers differ"


@pytest.mark.slow
def test_equal_preferences_and_no_variance_keep_what_snapkv_keeps():
    rows = random_rows(1, 40)
    *_, (counts, sets) = climbed(policies.cake(11, window=WINDOW, gamma=0), np.repeat(rows, 5, axis=0))
    np.testing.assert_array_equal(counts, 11 - WINDOW)
    snapkv = policies.snapkv(11, window=WINDOW, kernel=5)
    mask = kept(snapkv, tokens(2, 40), evidence(40, rows=rows[0]), context(40, heads=2))
    for layer in sets:
        assert layer == [set(np.flatnonzero(head).tolist()) for head in mask]


@pytest.mark.slow
def test_attention_that_never_moves_gives_every_layer_its_mean():
    rows = np.full((4, 2, 2, WINDOW, 40), 1 / 40)
    *_, (counts, sets) = climbed(policies.cake(11, window=WINDOW), rows)
    np.testing.assert_array_equal(counts, 11 - WINDOW)
    assert all(len(head) == 11 for layer in sets for head in layer)


@pytest.mark.slow
def test_a_prompt_within_the_budget_is_left_whole_and_fills_up_while_decoding():
    prompt, lengths = prompts(30, 12)
    policy = policies.cake(20, window=WINDOW)
    _, cache = kvx.prefill(model(), prompt, policy, lengths, max_new_tokens=64)
    for store, length in zip(cache.layers, np.asarray(cache.places[0].length), strict=False):
        assert length > 0
        np.testing.assert_array_equal(np.sum(np.asarray(store.positions())[1] >= 0, axis=-1), 12)
    assert int(cache.room) == ENDLESS
    for token in range(20):
        _, cache = kvx.decode_step(model(), np.asarray([token, token]), cache, policy)
    counts = [np.sum(np.asarray(store.positions()) >= 0, axis=-1) for store in cache.layers]
    np.testing.assert_array_equal(np.stack(counts)[:, 1], 20)
    assert np.stack(counts)[:, 0].mean() == 20


@pytest.mark.slow
def test_bytes_are_one_pool_of_the_budget_and_a_spare_slot_a_layer():
    layers, heads, width, rows, budget = 4, CONFIG["num_key_value_heads"], CONFIG["head_dim"], 3, 24
    prompt, lengths = prompts(100, 60, 25)
    _, cache = kvx.prefill(model(), prompt, policies.cake(budget, window=WINDOW), lengths)
    slots = round_up(layers * (budget + 1))
    pool = rows * heads * slots * (2 * width * 4 + 4)
    each = 2 * rows * 4 + rows * heads * 4 + width // 2 * 4 + 4  # a run, counts, the rotation
    assert cache.nbytes == pool + layers * each + rows * 4 + 4


def shape_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_an_arrival_lays_the_pool_anew_in_place():
    """The program's temporaries are the ranking's integers; another copy of keys and values would be a whole pool."""
    layers, length, heads, width, window = 8, 1024, 2, 128, 8
    policy = policies.cake(256, window=window)
    (stage,) = policy.stages
    spec = Spec(attention(heads, heads, width), layers, length, 1, 128)
    where = Context(jnp.int32(1), jnp.asarray([length], jnp.int32), spec)
    rows = jnp.full((1, heads, 1, window, length), 1 / length)
    some, seen = tokens(heads, length, width), Evidence(jnp.asarray([length], jnp.int32), rows)
    carry = _ascend(policy, None, some, seen, where, placement=None)
    held, structure = jax.tree.flatten(carry)
    new, layer = jax.tree.flatten((some, seen, where))

    def arrive(held, new):
        return jax.tree.leaves(stage.ascend(structure.unflatten(held), *layer.unflatten(new)))

    # Flat leaves, since `lower` would rebuild a pool of descriptions, which its checked shapes refuse.
    memory = jax.jit(arrive, donate_argnums=0).lower(held, new).compile().memory_analysis()
    pool = carry.pool.keys.nbytes + carry.pool.values.nbytes
    print("pool", pool, "temporaries", memory.temp_size_in_bytes, "aliased", memory.alias_size_in_bytes)
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool / 2


def kv_bytes(rows):
    heads, width = CONFIG["num_key_value_heads"], CONFIG["head_dim"]
    arrays = (array for array in jax.live_arrays() if array.ndim == 4)
    return sum(a.nbytes for a in arrays if a.shape[:2] == (rows, heads) and a.shape[3] == width)


@pytest.mark.slow
def test_a_prefill_holds_the_pool_and_one_full_layer(monkeypatch):
    rows, length, budget, layers = 3, 768, 32, 4
    samples, before = [], kv_bytes(rows)

    def sampling(function):
        def call(*positional, **named):
            samples.append(kv_bytes(rows))
            result = function(*positional, **named)
            samples.append(kv_bytes(rows))
            return result

        return call

    for name, where in (("attend", "prefill"), ("_ascend", "cache_builder"), ("_land", "cache_builder")):
        module = importlib.import_module(f"kvx.{where}")
        monkeypatch.setattr(module, name, sampling(getattr(module, name)))
    prompt, _ = prompts(*[length] * rows)
    _, cache = kvx.prefill(model(), prompt, policies.cake(budget, window=WINDOW))
    assert len(samples) == 6 * layers
    slots, heads, width = round_up(layers * (budget + 1)), CONFIG["num_key_value_heads"], CONFIG["head_dim"]
    slot = 2 * rows * heads * width * 4
    assert kv_bytes(rows) - before == slots * slot < cache.nbytes
    assert max(samples) - before == (slots + length) * slot


@pytest.mark.parametrize(
    "wrong",
    [{"window": 1}, {"window": 40}, {"tau1": 0}, {"tau2": -1.0}, {"gamma": -1}, {"kernel": 4}, {"tau1": float("nan")}],
)
def test_parameters_that_cannot_be_are_refused(wrong):
    with pytest.raises(kvx.BadInput, match=next(iter(wrong))):
        policies.cake(32, **wrong)


def test_nothing_else_can_select_before_the_pool():
    with pytest.raises(kvx.BadInput, match="cake"):
        chain(policies.snapkv(64), policies.cake(32, window=WINDOW))
