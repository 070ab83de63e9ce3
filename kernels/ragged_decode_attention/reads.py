"""What every kernel of ragged and sparse attention reads: lists of rows in one flat memory, each with its queries.

A run is a list of consecutive rows; a block table lists pages of them; a sparse read lists the pages that were chosen.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class Reads:
    """L lists; M queries read each.

    Slot j of list l is row starts[l] + j, or row table[l, j // page] * page + j % page.

    Attributes:
        queries: rotated.
        keys: one row a slot, all lists' together; the first D channels are its key, and the last V its value if
            `values` is None.
        values: or None.
        value_dim: V.
        lengths: slots of each list.
        starts: first row of each list that is a run.
        table: pages of each list that is not; entries beyond its length are arbitrary.
        page: rows a page, 1 for a run.
        longest: static bound on `lengths`.
        query_positions: true positions; None: every slot is seen.
        key_positions: true positions by row, -1 where empty; as they lie, the last axis of consecutive slots, and more
            than N of them if they have to fill it.
    """

    queries: Float[Array, "L M D"]
    keys: Float[Array, "N E"]
    values: Float[Array, "N V"] | None
    value_dim: int
    lengths: Int[Array, "L"]
    starts: Int[Array, "L"] | None
    table: Int[Array, "L W"] | None
    page: int
    longest: int
    query_positions: Int[Array, "L M"] | None
    key_positions: Int[Array, "*lead A C"] | None

    def rows(self, slots: Int[Array, "L S"]) -> Int[Array, "L S"]:
        """The row of each slot, in range also where the list has none."""
        if self.table is None:
            rows = self.starts[:, None] + slots  # type: ignore[index]
        else:
            which = jnp.clip(slots // self.page, 0, self.table.shape[1] - 1)
            rows = jnp.take_along_axis(self.table, which, axis=1) * self.page + slots % self.page
        return jnp.clip(rows, 0, self.keys.shape[0] - 1)

    def seen(self, slots: Int[Array, "L S"], window: int | None) -> Bool[Array, "L M S"]:
        """Which slots each query sees."""
        held = ((slots >= 0) & (slots < self.lengths[:, None]))[:, None]
        if self.key_positions is None or self.query_positions is None:
            return jnp.broadcast_to(held, (*self.queries.shape[:2], slots.shape[1]))
        keys = self.key_positions.reshape(-1)[self.rows(slots)][:, None]
        queries = self.query_positions[..., None]
        held = held & (keys >= 0) & (keys <= queries)
        return held if window is None else held & (queries - keys < window)


def slots_of(pages: Int[Array, "*lists n"], page: int) -> Int[Array, "*lists n p"]:
    """Indices of the slots of some pages, in a run of all pages' slots."""
    return pages[..., None] * page + jnp.arange(page)


def by_list(array: Array) -> Array:
    """(B, G, R, T, ...) queries as (B * G, R * T, ...)."""
    batch, heads, group, length, *rest = array.shape
    return array.reshape(batch * heads, group * length, *rest)


def positions_by_list(positions: Int[Array, "B T"], heads: int, group: int) -> Int[Array, "BG RT"]:
    """True positions of the queries that `by_list` orders."""
    batch, length = positions.shape
    return jnp.broadcast_to(positions[:, None, None], (batch, heads, group, length)).reshape(batch * heads, -1)
