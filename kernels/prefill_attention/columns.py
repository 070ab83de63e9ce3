"""Column statistics: what a key received from the queries, reduced over them; never an S x S array.

A statistic is sum_i or max_i over the queries i of p_ij^power, p the probability of key j. H2O's column mass, the
squares that a variance needs, the mass that comes from near by, and a vote of the last queries are settings of it.
"""

from dataclasses import dataclass
from math import inf
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True, order=True)
class Column:
    """One statistic.

    Attributes:
        power: 1 or 2.
        reduce: "sum" or "max" over the queries.
        pooled: the power acts on the mean probability of the query heads of a KV head, instead of on each.
        near: only queries that come fewer than ceil(near * length) tokens after the key count; length is the row's.
        last: only the row's last floor(last * length) + 1 queries count.
        rise: what the last query counts for; those before it less, linearly down to 1.

    Raises:
        ValueError: when it is made, for another power or reduction: a kernel would take the first for 1.
    """

    power: int = 1
    reduce: str = "sum"
    pooled: bool = False
    near: float = inf
    last: float = inf
    rise: float = 1.0

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise ValueError(f"power is {self.power}, allowed are 1 and 2")
        if self.reduce not in ("sum", "max"):
            raise ValueError(f"reduce is {self.reduce!r}, allowed are 'sum' and 'max'")

    def combine(self, first: Float[Array, "*shape"], second: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The statistic over two disjoint sets of queries."""
        return jnp.maximum(first, second) if self.reduce == "max" else first + second

    def of(
        self,
        weights: Float[Array, "B G R T S"],
        total: Float[Array, "B G R T"],
        distance: Int[Array, "B G T S"],
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B"] | None,
    ) -> Float[Array, "B G R S"]:
        """The statistic over these queries.

        Args:
            weights, total: unnormalised probabilities and their sums, p = weights / total.
            distance: tokens from key to query.
            positions: of the queries.
            lengths: tokens of each row; read if `near` or `last` is finite.
        """
        shape = (*weights.shape[:3], weights.shape[-1])
        if self.near < inf:
            weights = jnp.where(self._near(distance, lengths)[:, :, None], weights, 0.0)
        vote = self.votes(positions, lengths)[:, None, None]
        if self.pooled:
            mean = jnp.mean(weights / total[..., None], axis=2, keepdims=True)
            return jnp.broadcast_to(self.reduced(vote[..., None] * mean**self.power, axis=-2), shape)
        if self.reduce == "sum":
            # As matrix-vector products: they read the weights once and write no normalised copy.
            return jnp.einsum("bgrt,bgrts->bgrs", vote / total**self.power, weights**self.power)
        return self.reduced(vote[..., None] * (weights / total[..., None]) ** self.power, axis=-2)

    def votes(self, positions: Int[Array, "B T"], lengths: Int[Array, "B"] | None) -> Float[Array, "B T"]:
        """What each query counts for: 0 before the last ones, then rising from 1 to `rise`."""
        if self.last == inf:
            return jnp.ones(positions.shape, jnp.float32)
        assert lengths is not None, "a statistic of the last queries needs the rows' lengths"
        earlier = share_of(lengths, self.last)[:, None]
        return risen(positions - (lengths[:, None] - 1 - earlier), earlier, self.rise)

    def reduced(self, mapped: Float[Array, "*shape"], axis: int) -> Float[Array, "*less"]:
        """Over the axis of the queries, of what each of them gives."""
        return (jnp.max if self.reduce == "max" else jnp.sum)(mapped, axis=axis)

    def _near(self, distance: Int[Array, "B G T S"], lengths: Int[Array, "B"] | None) -> Bool[Array, "B G T S"]:
        assert lengths is not None, "a statistic of near queries needs the rows' lengths"
        return distance < near_width(lengths, self.near)[:, None, None, None]


def votes_and_widths(
    columns: tuple[Column, ...], positions: Int[Array, "B T"], lengths: Int[Array, "B"] | None
) -> tuple[Float[Array, "B N T"], Int[Array, "B N"]] | tuple[None, None]:
    """What each query counts for and how many tokens are near, by statistic; None: every query counts, of any key."""
    if lengths is None or all(min(column.near, column.last) == inf for column in columns):
        return None, None
    votes = jnp.stack([column.votes(positions, lengths) for column in columns], axis=1)
    return votes, jnp.stack([near_width(lengths, column.near) for column in columns], axis=1)


def near_width(lengths: Int[Array, "B"], near: float) -> Int[Array, "B"]:
    """ceil(near * length), with a little less than the share so that float rounding adds no token."""
    if near == inf:
        return jnp.full_like(lengths, jnp.iinfo(jnp.int32).max)
    return jnp.ceil(near * lengths - 1e-4).astype(jnp.int32)


def share_of(lengths: Int[Any, "*rows"], share: float) -> Int[Any, "*rows"]:
    """floor(share * length), of numpy's arrays too: one float32 product, which every backend rounds alike."""
    return (lengths.astype("float32") * np.float32(share)).astype("int32")


def risen(place: Int[Array, "*batch"], earlier: Int[Array, "*#batch"], rise: float) -> Float[Array, "*batch"]:
    """Weight of the query at `place` among `earlier + 1`: linear from 1 at 0 to `rise` at the last; 0 elsewhere."""
    slope = (rise - 1) * place.astype(jnp.float32) / jnp.maximum(earlier, 1)
    return jnp.where((place >= 0) & (place <= earlier), 1 + slope, 0.0)


SUM = Column()
SQUARE = Column(power=2)
MAX = Column(reduce="max")
