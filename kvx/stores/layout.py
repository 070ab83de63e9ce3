"""How a token's key and value lie in memory: a row each; slots last; or both in one row.

On a TPU the last axis of an array fills lanes of 128. A head dim of 64 takes twice its bytes there, or the whole cache
is turned about, or copied into padded rows, at every call. Slots last, any width costs nothing; but pages and runs of
slots are read by rows, so a store of those holds key and value side by side, 128 numbers.
"""

from dataclasses import dataclass
from math import gcd, lcm
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.buckets import round_up
from kvx.kernels.decode_attention.operands import Rows
from kvx.kernels.implementations import LANES, target_platform
from kvx.kernels.merge_partials import Partial
from kvx.kernels.sparse_decode_attention import sparse_decode_attention
from kvx.kernels.write_lanes import write_lanes
from kvx.query import Query
from kvx.stores.slots import scatter
from kvx.tokens import Tokens

RUN = 512
"""Slots that are read at a time, at most, where all are."""

Pair = tuple[Float[Array, "..."], Float[Array, "..."]]
"""Of keys and of values: rows (..., C, D) and (..., C, V), or what is held of them."""


@runtime_checkable
class Layout(Protocol):
    """One of the ways; whatever is held is two arrays."""

    def hold(self, rows: Pair) -> Pair:
        """Rows as they are held."""
        ...

    def show(self, held: Pair) -> Pair:
        """What is held, as rows again."""
        ...

    def put(self, held: Pair, slots: Int[Array, "B G n"], rows: Pair) -> Pair:
        """Rows written in place at ascending, distinct slots; those beyond the last are dropped."""
        ...

    def put_values(self, held: Pair, slots: Int[Array, "B G n"], values: Float[Array, "B G n V"]) -> Pair:
        """The same of values alone."""
        ...

    def attend(
        self, query: Query, rotated: Float[Array, "B G R T D"], held: Pair, positions: Int[Array, "B G C"]
    ) -> Partial:
        """Attention of rotated queries over the slots of these true positions, -1 where empty."""
        ...

    def asked(
        self, rotated: Float[Array, "B G R T D"], held: Pair
    ) -> tuple[Float[Array, "B G R T n"], Float[Array, "B G m n"] | Rows]:
        """Queries, and keys as attention takes them, whose products are the logits."""
        ...


@dataclass(frozen=True)
class Apart:
    """A row for the key and a row for the value."""

    def hold(self, rows: Pair) -> Pair:
        return rows

    def show(self, held: Pair) -> Pair:
        return held

    def put(self, held: Pair, slots: Int[Array, "B G n"], rows: Pair) -> Pair:
        return scatter(held[0], slots, rows[0]), scatter(held[1], slots, rows[1])

    def put_values(self, held: Pair, slots: Int[Array, "B G n"], values: Float[Array, "B G n V"]) -> Pair:
        return held[0], scatter(held[1], slots, values)

    def attend(self, query: Query, rotated: Array, held: Pair, positions: Int[Array, "B G C"]) -> Partial:
        return query.attend(*held, positions, rotated)

    def asked(self, rotated: Array, held: Pair) -> tuple[Array, Array]:
        return rotated, held[0]


@dataclass(frozen=True)
class SlotsLast:
    """Both turned about: (..., D, C) and (..., V, C), with C whole lanes."""

    def hold(self, rows: Pair) -> Pair:
        return jnp.swapaxes(rows[0], -1, -2), jnp.swapaxes(rows[1], -1, -2)

    def show(self, held: Pair) -> Pair:
        return self.hold(held)

    def put(self, held: Pair, slots: Int[Array, "B G n"], rows: Pair) -> Pair:
        return self._put(held[0], slots, rows[0]), self._put(held[1], slots, rows[1])

    def put_values(self, held: Pair, slots: Int[Array, "B G n"], values: Float[Array, "B G n V"]) -> Pair:
        return held[0], self._put(held[1], slots, values)

    def attend(self, query: Query, rotated: Array, held: Pair, positions: Int[Array, "B G C"]) -> Partial:
        return query.attend(Rows(held[0], slots_last=True), Rows(held[1], slots_last=True), positions, rotated)

    def asked(self, rotated: Array, held: Pair) -> tuple[Array, Rows]:
        return rotated, Rows(held[0], slots_last=True)

    def _put(self, array: Array, slots: Int[Array, "B G n"], rows: Array) -> Array:
        if slots.shape[-1] == 1 and array.shape[2]:
            return write_lanes(array, slots, rows[..., None])
        return jnp.swapaxes(scatter(jnp.swapaxes(array, 2, 3), slots, rows), 2, 3)


@dataclass(frozen=True)
class SideBySide:
    """The value behind its key in one row, (..., C, D + V); nothing is held as values, (..., C, 0).

    Attributes:
        width: D.
    """

    width: int

    def hold(self, rows: Pair) -> Pair:
        return jnp.concatenate(rows, axis=-1), rows[1][..., :0]

    def show(self, held: Pair) -> Pair:
        return held[0][..., : self.width], held[0][..., self.width :]

    def put(self, held: Pair, slots: Int[Array, "B G n"], rows: Pair) -> Pair:
        return scatter(held[0], slots, jnp.concatenate(rows, axis=-1)), held[1]

    def put_values(self, held: Pair, slots: Int[Array, "B G n"], values: Float[Array, "B G n V"]) -> Pair:
        inside = jnp.minimum(slots, held[0].shape[2] - 1)[..., None]
        keys = jnp.take_along_axis(held[0], inside, axis=2)[..., : self.width]
        return self.put(held, slots, (keys, values.astype(keys.dtype)))

    def attend(self, query: Query, rotated: Array, held: Pair, positions: Int[Array, "B G C"]) -> Partial:
        batch, heads, slots, width = held[0].shape
        page = gcd(slots, RUN)
        everything = jnp.broadcast_to(jnp.arange(slots // page, dtype=jnp.int32), (batch, heads, 1, 1, slots // page))
        return sparse_decode_attention(
            rotated,
            held[0],
            None,
            query.positions,
            positions,
            everything,
            page=page,
            value_dim=width - self.width,
            **query.masking,
        )

    def asked(self, rotated: Array, held: Pair) -> tuple[Array, Array]:
        # Zeros meet the values: a slice of the rows would be a copy of them.
        return jnp.pad(rotated, [(0, 0)] * 4 + [(0, held[0].shape[-1] - self.width)]), held[0]


APART, SLOTS_LAST = Apart(), SlotsLast()


def layout_for(tokens: Tokens, *, by_rows: bool = False) -> Layout:
    """What the platform that is compiled for wants of such tokens.

    Args:
        by_rows: whether the store reads pages or runs of slots.
    """
    widths = [array.shape[-1] for array in (tokens.keys, tokens.values) if array.shape[-1]]
    if target_platform() != "tpu" or all(width % LANES == 0 for width in widths):
        return APART
    if not by_rows:
        return SLOTS_LAST
    return SideBySide(widths[0]) if len(widths) == 2 and sum(widths) % LANES == 0 else APART


def slots_by_rows(count: int, page: int) -> int:
    """Slots of a store that reads them by pages or runs: whole pages, and on a TPU whole lanes.

    Positions lie slots last, and a kernel would have to copy them if they ended within lanes.
    """
    return round_up(count, lcm(page, LANES) if target_platform() == "tpu" else page)
