"""Budgets that data split over layers, and the stage that stores such layers in one pool."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.buckets import round_up
from kvx.context import Context, Spec
from kvx.evidence import Evidence, Requests
from kvx.kernels.prefill_attention.columns import SUM
from kvx.parts.amounts import Amount
from kvx.parts.budgets import Budget
from kvx.parts.ranking import largest_remainder
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.pooled import Pool, Pooled
from kvx.tokens import Tokens


@pytree
class ByVariance(Budget):
    """Layers whose attention is spread out get more (D2O, Wan et al. 2024, section 3.2).

        x_h = Var_j(column mass of head h),   f = mean_h (x_h - min x) / (max x - min x + 1e-6),   share = softmax_l(-f)

    A layer gets share times the total, capped at what a row can ever hold; by largest remainder with the total
    conserved, where the paper clips without sharing out the difference.
    """

    amount: Amount = static()
    decides = "end"

    def observe(self) -> Requests:
        """The column mass of every query head."""
        return Requests(columns=frozenset({SUM}))

    def measure(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B"]:
        """How concentrated this layer's attention is, from 0 (spread out) to 1."""
        mass, present = evidence.columns[SUM], tokens.present[:, :, None]
        count = jnp.maximum(jnp.sum(present, axis=-1), 1)
        mean = jnp.sum(jnp.where(present, mass, 0.0), axis=-1) / count
        spread = jnp.sum(jnp.where(present, (mass - mean[..., None]) ** 2, 0.0), axis=-1) / jnp.maximum(count - 1, 1)
        low, high = (reduce(spread, axis=(1, 2), keepdims=True) for reduce in (jnp.min, jnp.max))
        return jnp.mean((spread - low) / (high - low + 1e-6), axis=(1, 2))

    def allocate(
        self, measures: list[Float[Array, "B"]], spec: Spec, lengths: Int[Array, "B"], ends: Int[Array, "B"]
    ) -> list[Int[Array, "B"]]:
        """Slots of each layer that takes part, per row."""
        concentration = jnp.stack(measures)
        shares = jnp.exp(-concentration) / jnp.sum(jnp.exp(-concentration), axis=0)
        # What a layer cannot fill goes to the others: a budget that holds every token is the full cache in every layer.
        caps = jnp.broadcast_to(ends, shares.shape)
        return list(largest_remainder(shares, len(measures) * self.amount.of(lengths, spec.prompt), caps))

    def capacity(self, spec: Spec, layer: int) -> int:
        # f lies in [0, 1], so no layer's share exceeds e times the mean.
        return min(math.ceil(math.e * self.amount.most(spec.prompt)) + 1, spec.prompt + spec.room)

    def counts(self, scores: Float[Array, "B G T"], mask: Bool[Array, "B G T"], context: Context) -> Int[Array, "B G"]:
        return jnp.broadcast_to(context.plan[:, None], mask.shape[:2])

    def recent(self, amount: Amount | None, sinks: Int[Array, "B"], context: Context) -> Int[Array, "B"]:
        """In proportion to the layer's slots, as the paper's ratios are; sinks come first where both do not fit."""
        average = jnp.maximum(self.amount.of(context.lengths, context.spec.prompt), 1)
        scaled = super().recent(amount, sinks, context) * context.plan // average
        return jnp.clip(scaled, 0, jnp.maximum(context.plan - sinks, 0))

    def at_least(self, counts: Int[Array, "B G"], protected: Int[Array, "B G"]) -> Int[Array, "B G"]:
        """The counts as they are: a layer's run in the pool has no more slots, whatever is protected."""
        return counts


@pytree
class PoolUp(Stage):
    """The layers that take part live in one pool of their total, with a spare slot each for the fresh token."""

    split: ByVariance = static()
    skip: tuple[int, ...] = static(())
    stores = True
    decides = "end"

    def at(self, layer: int, layers: int) -> "PoolUp | None":
        return None if layer in {index % layers for index in self.skip} else self

    def measure(self, tokens: Tokens, evidence: Evidence) -> Any:
        return self.split.measure(tokens, evidence)

    def plan(self, measures: list[Any], spec: Spec, lengths: Int[Array, "B"], ends: Int[Array, "B"]) -> list[Any]:
        sizes = jnp.stack(self.split.allocate(measures, spec, lengths, ends)) + 1
        starts = jnp.cumsum(sizes, axis=0) - sizes
        return list(zip(starts, sizes, strict=True))

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Pooled:
        spec, (start, length) = context.spec, context.plan
        taking_part = spec.layers - len({index % spec.layers for index in self.skip})
        each = min(self.split.amount.most(spec.prompt), spec.prompt + spec.room) + 1
        held = [stored for stored in context.storage if isinstance(stored, Pool)]
        pool = held[0] if held else Pool.empty(tokens, round_up(taking_part * each))
        return Pooled.pack(tokens, mask, pool, start, length, self.split.capacity(spec, 0) + 1)
