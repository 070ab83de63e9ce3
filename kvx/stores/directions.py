"""Shared directions: what two layers hold at a token as one unit vector and two norms, and a few pairs kept apart."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.pytree import pytree
from kvx.stores.base import nbytes
from kvx.stores.slots import write_slot

NEAR = 1e-4
"""Radians within which two directions count as equal, or as opposite: there sin(angle) carries no digits."""


@dataclass(frozen=True)
class Blend:
    """How the vectors of two layers at a token become one direction, and which pairs do not.

    Attributes:
        t: from 0, the upper layer's direction, to 1, the lower layer's.
        gamma: share of a head's range over the prompt within which pairs stay apart; None: all of them do.
        cap: pairs that stay apart at most, as a share of the tokens so far.
        apart: which end of the range: the "distinct" or the "alike".
    """

    t: float
    gamma: float | None
    cap: float
    apart: str

    def rows(self, capacity: int) -> int:
        """Static rows for pairs that stay apart, where `capacity` tokens can come."""
        if self.gamma is None:
            return capacity
        return min(max(math.ceil(self.cap * capacity), 1), capacity)

    def allowed(self, count: Int[Array, "B"]) -> Int[Array, "B"]:
        """Pairs that may stay apart among `count` tokens, of each row for itself; at most `rows` of the capacity."""
        if self.gamma is None:
            return count
        # A little less than the product, so that float rounding adds no pair.
        return jnp.ceil(self.cap * count - 1e-4).astype(jnp.int32)

    def ranked(self, angle: Float[Array, "B G C"], present: Bool[Array, "B G C"]) -> Float[Array, "B G C"]:
        """How much each pair of a prompt ought to stay apart, opposite ones before all; -inf: it merges.

        Least and greatest are those of one KV head and row.
        """
        opposite = angle > jnp.pi - NEAR
        if self.gamma is None:
            chosen = present
        else:
            distinct = self.apart == "distinct"
            measure = jnp.cos(angle) if distinct else angle
            low = jnp.min(jnp.where(present, measure, jnp.inf), axis=-1, keepdims=True)
            high = jnp.max(jnp.where(present, measure, -jnp.inf), axis=-1, keepdims=True)
            # Strictly, in the form that rounding cannot turn: at gamma = 1 the other end of the range merges.
            chosen = measure - low < self.gamma * (high - low)
        rank = -angle if self.apart == "alike" else angle
        return jnp.where(present & (chosen | opposite), jnp.where(opposite, jnp.inf, rank), -jnp.inf)


@pytree
class Directions:
    """Vectors of two layers, the lower's index 0: row j of layer i is norms[j, i] * unit[j], or kept as it was.

    A pair that stays apart has norms 0, so that its row in `apart` only has to be added.

    Bytes per slot and KV head: D * itemsize + 8; per row kept apart: 2 D * itemsize + 4.

    Attributes:
        unit: in the cache's dtype; of length 1.
        norms: float32.
        apart: both layers' vectors of the pairs that stay apart, in the cache's dtype.
        slots: whose they are, filled from the front; C for a row not in use.
    """

    unit: Float[Array, "B G C D"]
    norms: Float[Array, "B G C 2"]
    apart: Float[Array, "B G N 2 D"]
    slots: Int[Array, "B G N"]

    @classmethod
    def pack(
        cls,
        lower: Float[Array, "B G C D"],
        upper: Float[Array, "B G C D"],
        present: Bool[Array, "B G C"],
        blend: Blend,
    ) -> "Directions":
        """A prompt's vectors by slot."""
        unit, norms, angle = merged(lower, upper, blend.t)
        capacity = present.shape[-1]
        worth, index = jax.lax.top_k(blend.ranked(angle, present), blend.rows(capacity))
        most = blend.allowed(jnp.sum(present[:, 0], axis=-1, dtype=jnp.int32))
        kept = (worth > -jnp.inf) & (jnp.arange(worth.shape[-1]) < most[:, None, None])
        slots = jnp.where(kept, index, capacity)
        batch, heads = jnp.ogrid[: slots.shape[0], : slots.shape[1]]
        norms = norms.at[batch[..., None], heads[..., None], slots].set(0.0, mode="drop")
        rows = [jnp.take_along_axis(array, index[..., None], axis=2) for array in (lower, upper)]
        return cls(unit.astype(upper.dtype), norms, jnp.stack(rows, axis=3), slots)

    def write(
        self,
        slot: Int[Array, "B G"],
        lower: Float[Array, "B G D"],
        upper: Float[Array, "B G D"],
        count: Int[Array, "B"],
        blend: Blend,
    ) -> "Directions":
        """One pair a head at `slot` (C: nowhere), `count` tokens with it; apart if it must be and there is room.

        Opposite vectors without a row to keep them apart share the direction of the layer that `t` is nearer to.
        """
        capacity = self.unit.shape[2]
        unit, norms, angle = merged(lower, upper, blend.t)
        row = jnp.sum(self.slots < capacity, axis=-1)
        must = angle > jnp.pi - NEAR if blend.gamma is not None else jnp.ones_like(angle, bool)
        rows = self.slots.shape[-1]
        stays = must & (row < jnp.minimum(blend.allowed(count), rows)[:, None]) & (slot < capacity)
        row = jnp.where(stays, row, rows)
        return Directions(
            write_slot(self.unit, slot, unit),
            write_slot(self.norms, slot, jnp.where(stays[..., None], 0.0, norms)),
            write_slot(self.apart, row, jnp.stack([lower, upper], axis=2)),
            write_slot(self.slots, row, slot),
        )

    def restored(self, layer: int) -> Float[Array, "B G C D"]:
        """One layer's vectors by slot."""
        rows = (self.norms[..., layer, None] * self.unit).astype(self.unit.dtype)
        batch, heads = jnp.ogrid[: rows.shape[0], : rows.shape[1]]
        return rows.at[batch[..., None], heads[..., None], self.slots].set(self.apart[:, :, :, layer], mode="drop")

    def products(self, queries: Float[Array, "B G T D"], layer: int) -> Float[Array, "B G T C"]:
        """Queries times one layer's vectors, float32: the norm is put on the product, no vector is restored."""
        found = _times(queries, self.unit) * self.norms[:, :, None, :, layer]
        extra = jnp.swapaxes(_times(queries, self.apart[:, :, :, layer]), 2, 3)
        batch, heads = jnp.ogrid[: found.shape[0], : found.shape[1]]
        return found.at[batch[..., None], heads[..., None], :, self.slots].add(extra, mode="drop")

    def mixed(self, weights: Float[Array, "B G T C"], layer: int) -> Float[Array, "B G T D"]:
        """One layer's vectors summed with these weights, float32."""
        extra = jnp.take_along_axis(weights, self.slots[:, :, None], axis=3, mode="fill", fill_value=0)
        scaled = weights * self.norms[:, :, None, :, layer]
        return _sum(scaled, self.unit) + _sum(extra, self.apart[:, :, :, layer])

    def bytes_read(self) -> int:
        """Bytes that one layer's step touches: all directions, its own norms and rows."""
        return self.unit.nbytes + (self.norms.nbytes + self.apart.nbytes) // 2 + nbytes(self.slots)


def merged(
    lower: Float[Array, "*shape D"], upper: Float[Array, "*shape D"], t: float
) -> tuple[Float[Array, "*shape D"], Float[Array, "*shape 2"], Float[Array, "*shape"]]:
    """The direction between two vectors by spherical interpolation, their norms, and the angle between them; float32.

        unit = sin((1 - t) angle) / sin(angle) * upper/|upper| + sin(t angle) / sin(angle) * lower/|lower|

    The angle is 2 atan2(|x - y|, |x + y|) of the unit vectors (Kahan), since arccos loses half the digits near 0 and
    pi. Within NEAR of 0 the weights are their limits 1 - t and t; within NEAR of pi the direction is that of the layer
    that t is nearer to. A vector of length 0 takes no part.
    """
    pair = [array.astype(jnp.float32) for array in (lower, upper)]
    norms = jnp.stack([jnp.linalg.norm(array, axis=-1) for array in pair], axis=-1)
    y, x = (_unit(array) for array in pair)
    angle = 2 * jnp.arctan2(jnp.linalg.norm(x - y, axis=-1), jnp.linalg.norm(x + y, axis=-1))
    same, opposite = angle < NEAR, angle > jnp.pi - NEAR
    sine = jnp.where(same | opposite, 1.0, jnp.sin(angle))

    def weight(share: float, nearer: bool) -> Float[Array, "*shape 1"]:
        between = jnp.sin(share * angle) / sine
        return jnp.where(same, share, jnp.where(opposite, float(nearer), between))[..., None]

    return _unit(weight(1 - t, t <= 0.5) * x + weight(t, t > 0.5) * y), norms, angle


def _unit(vector: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
    return vector / jnp.maximum(jnp.linalg.norm(vector, axis=-1, keepdims=True), 1e-30)


def _times(queries: Float[Array, "B G T D"], rows: Float[Array, "B G N D"]) -> Float[Array, "B G T N"]:
    return jnp.einsum("bgtd,bgnd->bgtn", queries, rows, preferred_element_type=jnp.float32)


def _sum(weights: Float[Array, "B G T N"], rows: Float[Array, "B G N D"]) -> Float[Array, "B G T D"]:
    return jnp.einsum("bgtn,bgnd->bgtd", weights.astype(rows.dtype), rows, preferred_element_type=jnp.float32)
