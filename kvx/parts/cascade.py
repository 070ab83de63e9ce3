"""The stage that shares a total over layers while the prefill climbs them: earlier layers are cut when one arrives."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.buckets import round_up
from kvx.context import Context, Spec
from kvx.decoder import AttentionSpec
from kvx.evidence import Evidence, Requests
from kvx.parts.amounts import Amount
from kvx.parts.ranking import largest_remainder, top
from kvx.parts.scores import MeanPlusVariance
from kvx.pytree import pytree, static
from kvx.rotary import Rotary
from kvx.stage import Stage
from kvx.stores.pooled import Pool, Pooled
from kvx.tokens import Tokens

WORTH = "worth"
"""The statistic by which survivors are cut again; it goes when the prefill ends."""


@pytree
class Layers:
    """What the layers so far hold; the carry of the cascade.

    Attributes:
        pool: their runs, one after the other, each in order of position with a spare slot at its end.
        frequencies, magnitude: every layer's rotation (`Rotary`).
        preferences: log P of each layer, -inf for layers to come.
        counts: slots of each layer outside the window; what is held, where a layer has as many tokens.
    """

    pool: Pool
    frequencies: Float[Array, "L P"]
    magnitude: Float[Array, "L"]
    preferences: Float[Array, "B L"]
    counts: Int[Array, "B L"]


@pytree
class Cascade(Stage):
    """Layers share (C - W) L slots by how widely and how restlessly they attend (CAKE, Qin et al. 2025).

        P_l = H_l^(1/tau1) V_l^(1/tau2),    b_l = P_l / sum_k P_k (C - W) L over the layers k so far

    H and V are the entropy and the summed variance (over the queries) of what the last W queries give the tokens
    before them, not renormalised. Per row: a sequence never steers the budgets of another.

    Integers by largest remainder, each layer capped by what it holds: budgets then only fall, so that every cut is a
    subset of the last one, no slot is lost, and the total is conserved at every arrival. (The released code truncates
    and spreads; an early budget may grow again there, though its tokens are gone.)

    The runs live in one pool of C L slots (and a spare one a layer for decoding), re-laid in place at each arrival:
    the peak is this pool and one full layer.

    While decoding, b_l is fixed: one token out for each that comes, by what the newest query gives it.
    """

    score: MeanPlusVariance
    budget: Amount = static()
    entropy: float = static(1.0)
    variance: float = static(1.0)
    stores = True
    bounded = True
    decides = "cascade"
    unchained = True

    @property
    def window(self) -> int:
        """Newest tokens that are always kept."""
        return self.score.window

    def objection(self, layers: Mapping[int, AttentionSpec]) -> str | None:
        widths = {(each.kv_heads, each.key_dim, each.latent or each.value_dim) for each in layers.values()}
        if len(widths) > 1:
            return "keeps all layers in one pool, but their tokens differ in width; allowed: models of layers alike"
        return None

    def observe(self, prefill: bool) -> Requests:
        return self.score.observe(prefill)

    def capacity(self, spec: Spec, layer: int) -> int:
        most = self._most(spec)
        return max(most, min((most - self.window) * spec.layers + self.window, spec.prompt))

    def ascend(self, carry: Layers | None, tokens: Tokens, evidence: Evidence, context: Context) -> Layers:
        layer, spec = context.layer, context.spec
        recent = tokens.positions >= (evidence.seen - self.window)[:, None, None]
        worth = jnp.where(recent & tokens.present, jnp.inf, self.score.rank(tokens, evidence))
        tokens = replace(tokens.with_form(rotated=True), stats={WORTH: worth})
        before = self._none(tokens, spec) if carry is None else carry
        preferences = before.preferences.at[:, layer].set(self._preference(tokens, evidence))
        budgets = jnp.clip(self.budget.of(context.lengths, spec.prompt), self.window, self._most(spec))
        # A prompt within the budget leaves each layer its C - W, to be filled while decoding.
        fresh = jnp.maximum(context.lengths, budgets) - self.window
        index = jnp.arange(spec.layers)
        caps = jnp.where(index == layer, fresh[:, None], before.counts)
        total = (budgets - self.window) * spec.layers
        counts = largest_remainder(_shares(preferences).T, total, caps.T).T
        sizes = jnp.where(index <= layer, counts + self.window + 1, 0)
        starts = jnp.cumsum(sizes, axis=1) - sizes
        runs = jnp.where(index < layer, before.counts + self.window + 1, 0)
        source = _survivors(before.pool, runs, starts, counts + self.window)
        kept = top(worth, tokens.present, jnp.broadcast_to((counts[:, layer] + self.window)[:, None], worth.shape[:2]))
        place = jnp.cumsum(kept, axis=-1) - 1 + starts[:, layer][:, None, None]
        pool = before.pool.relaid(source, tokens, _inverse(kept, place, source.shape[-1]))
        frequencies = before.frequencies.at[layer].set(tokens.rotary.frequencies)
        magnitude = before.magnitude.at[layer].set(tokens.rotary.magnitude)
        return Layers(pool, frequencies, magnitude, preferences, counts)

    def land(self, carry: Layers, context: Context) -> tuple[Pooled, Int[Array, "B G"]]:
        layer, sizes = context.layer, carry.counts + self.window + 1
        start = (jnp.cumsum(sizes, axis=1) - sizes)[:, layer]
        rotary = Rotary(carry.frequencies[layer], carry.magnitude[layer])
        pool = replace(carry.pool, stats={})
        store = Pooled(pool, rotary, start, sizes[:, layer], self.capacity(context.spec, 0) + 1)
        return store, jnp.broadcast_to(sizes[:, layer, None] - 1, pool.slots.shape[:2])

    def step(self, store: Pooled, state: Int[Array, "B G"], evidence: Evidence, context: Context) -> tuple[Any, Any]:
        tokens = store.tokens()
        recent = tokens.positions >= (evidence.seen - self.window)[:, None, None]
        worth = jnp.where(recent, jnp.inf, self.score.rank(tokens, evidence))
        return store.release(worth, jnp.sum(tokens.present, axis=-1) - state), state

    def _most(self, spec: Spec) -> int:
        """The budget C of the longest prompt; no more than a layer can ever fill."""
        return max(min(self.budget.most(spec.prompt), spec.prompt + spec.room), self.window)

    def _none(self, tokens: Tokens, spec: Spec) -> Layers:
        """Before the first layer."""
        batch = tokens.positions.shape[0]
        return Layers(
            Pool.empty(tokens, round_up((self._most(spec) + 1) * spec.layers)),
            jnp.zeros((spec.layers, *tokens.rotary.frequencies.shape), jnp.float32),
            jnp.ones(spec.layers, jnp.float32),
            jnp.full((batch, spec.layers), -jnp.inf, jnp.float32),
            jnp.zeros((batch, spec.layers), jnp.int32),
        )

    def _preference(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B"]:
        """log P: products of powers of tiny variances underflow."""
        outside = tokens.present & (tokens.positions < (evidence.seen - self.window)[:, None, None])
        seen = jnp.where(outside[:, :, None, None], evidence.last_rows(self.window), 0.0)
        entropy = -jnp.sum(seen * jnp.log(seen + 1e-10), axis=(1, 2, 3, 4))
        variance = jnp.sum(jnp.var(seen, axis=-2, ddof=1), axis=(1, 2, 3))
        return jnp.log(jnp.maximum(entropy, 0.0)) / self.entropy + jnp.log(variance) / self.variance


def _shares(preferences: Float[Array, "B L"]) -> Float[Array, "B L"]:
    """In proportion to P; alike where no layer has any (constant attention has no variance)."""
    top_one = jnp.max(preferences, axis=1, keepdims=True)
    return jnp.where(jnp.isfinite(top_one), jnp.exp(preferences - top_one), 1.0)


def _survivors(
    pool: Pool, runs: Int[Array, "B L"], starts: Int[Array, "B L"], allowed: Int[Array, "B L"]
) -> Int[Array, "B G N"]:
    """Which slot fills each slot of the pool when the best `allowed` of each run move to `starts`; -1: none."""
    shape, index = pool.slots.shape, jnp.arange(pool.slots.shape[-1], dtype=jnp.int32)
    ends = jnp.cumsum(runs, axis=1)
    # The layer of each slot; past the last run, one that is allowed nothing.
    owner = jnp.sum(index >= ends[..., None], axis=1)
    begin, target, most = (
        jnp.take_along_axis(jnp.pad(each, ((0, 0), (0, 1))), owner, axis=1)[:, None]
        for each in (ends - runs, starts, allowed)
    )
    held = pool.slots >= 0
    # Sorted by layer first, every run stays in its place, so that a place tells the rank within the run.
    everyone = jnp.broadcast_to(index, shape)
    keys = (jnp.broadcast_to(owner[:, None], shape), ~held, -pool.stats[WORTH], everyone)
    order = jax.lax.sort(keys, dimension=-1, num_keys=3, is_stable=True)[3]
    places = jnp.put_along_axis(jnp.zeros(shape, jnp.int32), order, everyone, axis=-1, inplace=False)
    stays = held & (places - begin < most)
    earlier = jnp.cumsum(stays, axis=-1) - stays
    within = earlier - jnp.take_along_axis(earlier, jnp.broadcast_to(begin, shape), axis=-1)
    return _inverse(stays, target + within, shape[-1])


def _inverse(mask: Bool[Array, "B G T"], places: Int[Array, "B G T"], total: int) -> Int[Array, "B G N"]:
    """For each of `total` places the index of the entry in `mask` that goes there, -1 for none."""
    batch, heads = jnp.ogrid[: mask.shape[0], : mask.shape[1]]
    where = (batch[..., None], heads[..., None], jnp.where(mask, places, total))
    index = jnp.broadcast_to(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape)
    return jnp.full((*mask.shape[:2], total), -1, jnp.int32).at[where].set(index, mode="drop")
