"""Claims about MiKV (Yang et al. 2024): everything is kept, h2o decides how well, and balance changes no product."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.buckets import round_up
from kvx.context import Context, Spec
from kvx.errors import BadInput
from kvx.evidence import Evidence
from kvx.kernels.merge_partials import Partial
from kvx.kernels.prefill_attention.columns import SUM
from kvx.kernels.quantize_pack import dequantize, quantize
from kvx.parts.amounts import one_of
from kvx.parts.demote import Demote, LowBits
from kvx.parts.evict import Evict
from kvx.policies import h2o, mikv, snapkv
from kvx.policy import Policy
from kvx.pytree import pytree
from kvx.step import decode
from kvx.stores.base import nbytes
from kvx.stores.coded import Coded
from kvx.stores.tiers import Tiers
from tests.kvx.stores.one_layer import HEADS, SPEC, WIDTH, copies, query, tokens
from tests.tiny import model, prompts

SMALL = {"num_hidden_layers": 2}
LENGTHS = (70, 23)


@cache
def forced(policy, steps=10, lengths=LENGTHS, row=None):
    """Logits after each of a few given tokens, and the cache."""
    prompt, counts = prompts(*lengths)
    given = np.random.default_rng(7).integers(0, 97, (steps, len(lengths)))
    if row is not None:
        prompt, counts, given = prompt[[row]], counts[[row]], given[:, [row]]
    logits, cache = kvx.prefill(model(**SMALL), prompt, policy, counts, max_new_tokens=steps)
    seen = [np.asarray(logits)]
    for token in given:
        logits, cache = kvx.decode_step(model(**SMALL), token, cache, policy)
        seen.append(np.asarray(logits))
    return np.stack(seen), cache


def staying(store) -> list[list[list[int]]]:
    """Positions of the high tier by row and head, without what is about to leave it."""
    slots = np.asarray(store.tiers[0].positions())
    slots = np.where(np.arange(slots.shape[-1]) == np.asarray(store.leaving)[..., None], -1, slots)
    return kept(slots)


def kept(slots) -> list[list[list[int]]]:
    return [[sorted(head[head >= 0].tolist()) for head in row] for row in np.asarray(slots)]


@pytest.mark.sampled
@pytest.mark.parametrize(("high", "balance"), [(1, True), (0.3, False), (400, True)])
def test_without_codes_it_is_the_full_cache(high, balance):
    full, _ = forced(kvx.policies.full())
    logits, _ = forced(mikv(high=high, bits=None, balance=balance))
    assert np.abs(logits - full).max() <= 1e-5 * np.abs(full).max()


@pytest.mark.slow
def test_without_codes_generation_is_the_full_cache_s():
    prompt, lengths = prompts(*LENGTHS)
    one, other = (
        kvx.generate(model(**SMALL), prompt, policy=policy, lengths=lengths, max_new_tokens=8).tokens
        for policy in (mikv(high=8, bits=None), kvx.policies.full())
    )
    np.testing.assert_array_equal(one, other)


def test_every_token_is_kept_in_every_head():
    steps = 10
    _, cache = forced(mikv(high=8, bits=2), steps)
    for store in cache.layers:
        for row, length in zip(kept(store.positions()), LENGTHS, strict=True):
            assert row == [list(range(length + steps))] * len(row)
        high = np.sum(np.asarray(store.tiers[0].positions()) >= 0, axis=-1)
        assert np.all(high == 9) and np.all(np.asarray(store.leaving) >= 0)


@pytree
class Silent(Coded):
    """A low tier that attention does not see."""

    def read(self, query):
        shape = query.raw.shape[:4]
        return Partial(jnp.zeros((*shape, WIDTH)), jnp.full(shape, -jnp.inf))

    def probabilities(self, query, lse):
        return jnp.zeros((*lse.shape, self.slots.shape[-1]))


@pytree
class Forgetful(Demote):
    """MiKV whose low tier is silent."""

    def pack(self, tokens, mask, capacity, evidence, context):
        store = super().pack(tokens, mask, capacity, evidence, context)
        low = store.tiers[1]
        return Tiers.moving(store.tiers[0], Silent(**{name: getattr(low, name) for name in low.__dataclass_fields__}))


@pytest.mark.sampled
@pytest.mark.parametrize("high", [12, 0.25])
def test_without_its_low_tier_it_keeps_what_h2o_keeps(high):
    stage = mikv(high=high, bits=2).stages[0]
    forgetful = Policy((Forgetful(stage.host, stage.lower),), "forgetful")
    logits, cache = forced(forgetful)
    evicted, other = forced(h2o(budget=high))
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        assert staying(ours) == kept(theirs.positions())
    np.testing.assert_allclose(logits, evicted, atol=1e-5 * np.abs(evicted).max())


def test_a_selection_before_it_is_respected():
    policy = kvx.chain(snapkv(budget=20, window=8), mikv(high=6, bits=4))
    prompt, lengths = prompts(*LENGTHS)
    _, selected = kvx.prefill(model(**SMALL), prompt, snapkv(budget=20, window=8), lengths, max_new_tokens=4)
    _, cache = kvx.prefill(model(**SMALL), prompt, policy, lengths, max_new_tokens=4)
    for store, alone in zip(cache.layers, selected.layers, strict=True):
        assert kept(store.positions()) == kept(alone.positions())
        assert np.all(np.sum(np.asarray(store.tiers[0].positions()) >= 0, axis=-1) == 6)
        assert store.sizes == (16, round_up(20 + 128))
    _, cache = forced(policy, steps=5)
    for store, alone in zip(cache.layers, selected.layers, strict=True):
        for row, before, length in zip(kept(store.positions()), kept(alone.positions()), LENGTHS, strict=True):
            assert row == [[*head, *range(length, length + 5)] for head in before]


@pytest.mark.slow
def test_a_row_of_a_batch_equals_the_row_alone():
    policy = mikv(high=8, bits=2)
    together, cache = forced(policy)
    for row in range(len(LENGTHS)):
        alone, single = forced(policy, row=row)
        for ours, theirs in zip(cache.layers, single.layers, strict=True):
            assert staying(ours)[row] == staying(theirs)[0]
            flips = total = 0
            for one, other in zip(ours.dense()[:2], theirs.dense()[:2], strict=True):
                one, other = by_position(ours, one, row), by_position(theirs, other, 0)
                flips, total = flips + np.sum(np.abs(one - other) > 1e-3), total + one.size
            # Float noise from another padding may tip a number over a rounding edge.
            assert flips <= 0.002 * total
        assert np.abs(together[:, row] - alone[:, 0]).max() <= 0.02 * np.abs(alone).max()


def by_position(store, array, row):
    order = np.argsort(np.asarray(store.positions())[row], axis=-1, kind="stable")
    rows = np.take_along_axis(np.asarray(array)[row], order[..., None], axis=1)
    count = np.sum(np.asarray(store.positions())[row] >= 0, axis=-1).max()
    return rows[:, -count:]


@pytest.mark.sampled
@pytest.mark.parametrize("balanced", [True, False])
def test_decoding_agrees_with_a_dense_oracle(balanced):
    """MiKV played out literally for each row and head, token by token, against the stage."""
    high, steps, bits = 4, 6, 4
    lengths, width = (9, 6), 12
    positions = np.where(np.arange(width) < np.asarray(lengths)[:, None], np.arange(width), -1)
    prompt, asked = tokens(positions), query(positions)
    rotated = np.asarray(asked.rotated, np.float64)
    policy = mikv(high=high, bits=bits, recent=2, balance=balanced)
    spec = Spec(SPEC, 1, width, 1, steps)
    context = Context(jnp.int32(0), jnp.asarray(lengths, jnp.int32), spec)
    mass = causal_mass(rotated, np.asarray(prompt.keys, np.float64), positions)
    peak = np.where((positions >= 0)[:, None, None, :, None], np.abs(rotated), 0).max(axis=(2, 3))
    evidence = Evidence(context.lengths, columns={SUM: f32(mass)}, query_peak=f32(peak))
    layer = jax.jit(policy.prefill, static_argnums=3)(prompt, evidence, context, policy.slots(spec, 0))
    oracles = [
        [Oracle(prompt, mass, peak, row, head, lengths[row], high, 2, bits, balanced) for head in range(HEADS)]
        for row in range(len(lengths))
    ]
    for step in range(steps):
        at = np.asarray(lengths)[:, None] + step
        fresh, now = tokens(at, seed=20 + step), query(at, seed=40 + step)
        out, layer = one_step(policy, layer, fresh, now, context)
        for row, heads in enumerate(oracles):
            for head, oracle in enumerate(heads):
                expected = oracle.step(fresh, now, row, head)
                np.testing.assert_allclose(out[row, head, :, 0], expected, atol=5e-5)
                assert staying(layer.store)[row][head] == oracle.high_positions()


@jax.jit
def one_step(policy, layer, fresh, now, context):
    """What the layer loop does with one layer."""
    store = layer.store.append(policy.stats(fresh, None, context))
    part = store.read(now)
    seen = jnp.max(now.positions, axis=1) + 1
    evidence = Evidence(seen, rows=store.probabilities(now, part.lse))
    return part.out, policy.step(replace(layer, store=store), evidence, context)


def f32(array):
    return jnp.asarray(array, jnp.float32)


def causal_mass(queries, keys, positions):
    """Column sums (B, G, R, T) of causal attention over the prompts."""
    logits = SPEC.scale * np.einsum("bgrtd,bgsd->bgrts", queries, keys)
    seen = (positions[:, None] <= positions[:, :, None]) & (positions >= 0)[:, None] & (positions >= 0)[:, :, None]
    weights = np.where(seen[:, None, None], np.exp(logits), 0)
    return np.sum(weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300), axis=-2)


class Oracle:
    """One head's two lists: position -> (key, value, mass) exact, and position -> (key, value) as coded."""

    def __init__(self, prompt, mass, peak, row, head, length, high, recent, bits, balanced):
        self.high, self.recent, self.bits = high, recent, bits
        keys, values = (np.asarray(array)[row, head, :length] for array in (prompt.keys, prompt.values))
        ratio = np.sqrt(peak[row, head] / np.abs(keys).max(0))
        self.beta = ratio.astype(np.float32) if balanced else np.ones(WIDTH, np.float32)
        self.exact, self.coded = {}, {}
        for position in range(length):
            self.exact[position] = [keys[position], values[position], mass[row, head, :, position].mean()]
        while len(self.exact) > high:
            self.demote(length)

    def demote(self, seen):
        victims = {p: entry[2] for p, entry in self.exact.items() if p < seen - self.recent}
        victim = min(victims, key=lambda position: (victims[position], -position))
        key, value, _ = self.exact.pop(victim)
        self.coded[victim] = (self.code(key * self.beta) / self.beta, self.code(value))

    def code(self, vector):
        codes = quantize(jnp.asarray(vector)[None], self.bits)
        return np.asarray(dequantize(*codes))[0]

    def step(self, fresh, now, row, head):
        position = int(fresh.positions[row, head, 0])
        self.exact[position] = [np.asarray(fresh.keys)[row, head, 0], np.asarray(fresh.values)[row, head, 0], 0.0]
        places = [*self.exact, *self.coded]
        keys = np.stack([(self.exact.get(p) or self.coded[p])[0] for p in places]).astype(np.float64)
        values = np.stack([(self.exact.get(p) or self.coded[p])[1] for p in places]).astype(np.float64)
        weights = np.exp(SPEC.scale * np.asarray(now.rotated, np.float64)[row, head, :, 0] @ keys.T)
        weights /= weights.sum(-1, keepdims=True)
        for index, place in enumerate(places):
            if place in self.exact:
                self.exact[place][2] += weights[:, index].mean()
        if len(self.exact) > self.high:
            self.demote(position + 1)
        return weights @ values

    def high_positions(self):
        return sorted(self.exact)


def test_balance_is_frozen_at_the_end_of_the_prompt():
    policy = mikv(high=8, bits=2)
    prompt, lengths = prompts(*LENGTHS)
    _, cache = kvx.prefill(model(**SMALL), prompt, policy, lengths, max_new_tokens=4)
    before = [np.asarray(store.tiers[1].balance) for store in cache.layers]
    _, after = forced(policy, steps=4)
    for one, store in zip(before, after.layers, strict=True):
        np.testing.assert_array_equal(one, store.tiers[1].balance)
        assert one.dtype == np.float32 and np.all(one > 0)


@pytest.mark.parametrize(("bits", "group", "balance"), [(2, None, True), (4, 8, False)])
def test_bytes_follow_the_closed_form(bits, group, balance):
    prompt, lengths = prompts(*LENGTHS)
    _, cache = kvx.prefill(model(**SMALL), prompt, mikv(high=14, bits=bits, group=group, balance=balance), lengths)
    batch, n = 2, group or WIDTH // 2
    first, second = round_up(14 + 2), 128 + 128
    high = first * (2 * WIDTH * 4 + 4 + 4)
    low = second * (2 * WIDTH * bits // 8 + 4 * 2 * WIDTH // n + 4)
    heads = batch * HEADS * (high + low + (4 * WIDTH if balance else 0) + 4)
    rotation = 2 * (4 * WIDTH // 2 + 4)
    for store in cache.layers:
        assert store.sizes == (first, second)
        assert nbytes(store) == heads + rotation


def test_a_decode_step_copies_no_keys_values_or_codes():
    policy, small = mikv(high=0.25, bits=2), model(num_hidden_layers=1)
    prompt, lengths = prompts(*LENGTHS)
    _, cache = kvx.prefill(small, prompt, policy, lengths, max_new_tokens=4)
    token, everyone = jnp.zeros(2, jnp.int32), jnp.ones(2, bool)
    assert copies(lambda cache: decode(small, token, cache, policy, everyone), cache) == 0


def test_it_grows_and_nothing_that_evicts_at_every_step_may_precede_it():
    assert not mikv().bounded
    with pytest.raises(BadInput, match="cannot evict at every step"):
        kvx.chain(h2o(budget=8), mikv())
    with pytest.raises(BadInput, match="nothing can follow it"):
        kvx.chain(mikv(), h2o(budget=8))


@pytest.mark.slow
def test_any_stage_of_eviction_may_decide_what_stays_exact():
    """Also one that acts once: then generated tokens stay exact."""
    once = snapkv(budget=10, window=4).stages[0]
    assert isinstance(once, Evict)
    stage = mikv(bits=4).stages[0]
    _, cache = forced(Policy((Demote(once, LowBits(stage.lower.code, True)),), "mikv by snapkv"), steps=4)
    for store in cache.layers:
        for row, length in zip(staying(store), LENGTHS, strict=True):
            for head in row:
                assert len(head) == 14 and head[-8:] == list(range(length - 4, length + 4))


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"high": 0}, r"high=0 is not positive; allowed: an int of at least 1 .* or a float in \(0, 1\]"),
        ({"high": 1.5}, r"high=1.5 is out of range; allowed"),
        ({"high": float("nan")}, r"high=nan is out of range; allowed"),
        ({"bits": 5}, r"bits=5 is not offered; allowed: 2, 3, 4, 8, None"),
        ({"group": 0}, r"group=0 is out of range; allowed: an int of at least 1"),
        ({"high": 4, "recent": 5}, r"recent=5 protects more slots than high=4 has; allowed: at most 4"),
        ({"recent": -0.1}, r"recent=-0.1 is out of range; allowed: a number from 0 to 1"),
        ({"average": "median"}, r"average='median' is not offered; allowed: sum, mean"),
        ({"heads": "min"}, r"heads='min' is not offered; allowed: mean, max, sum"),
    ],
)
def test_bad_hyperparameters_are_refused_in_a_sentence(parameters, sentence):
    with pytest.raises(BadInput, match=sentence):
        mikv(**parameters)


def test_a_width_of_codes_is_an_int():
    """2.0 == 2, so that both would name the same choice but be written and compiled apart."""
    with pytest.raises(BadInput, match=r"bits=2.0 is not offered; allowed: 2, 4"):
        one_of(2.0, "bits", (2, 4))


def test_a_group_that_does_not_divide_the_head_dim_is_refused_before_compiling():
    prompt, lengths = prompts(*LENGTHS)
    with pytest.raises(BadInput, match="group=12 does not divide keys of 32 channels"):
        kvx.prefill(model(**SMALL), prompt, mikv(group=12), lengths)
