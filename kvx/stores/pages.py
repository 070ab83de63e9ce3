"""The store of pages: a pool of single-head pages behind a block table per KV head (PagedAttention)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.buckets import round_up
from kvx.kernels.decode_attention import decode_probabilities
from kvx.kernels.implementations import LANES
from kvx.kernels.merge_partials import Partial
from kvx.kernels.ragged_decode_attention import paged_decode_attention
from kvx.kernels.ragged_decode_attention.reads import slots_of
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.stores.base import nbytes
from kvx.stores.forked import Forked, Shared
from kvx.stores.layout import APART, Layout, layout_for
from kvx.tokens import Tokens, held_values

TURN = 256
"""Slots of every head that are scored per turn of a loop, or one page if that is more."""


@pytree
class Pages:
    """N pages of p slots; each head of each row owns those that its table names, in the order of its tokens.

    A head holds as many pages as its tokens and `room` need, so heads of different length take different bytes. They
    are handed out once, when the store is made: a page that a row which ended will never fill stays its own.

    Slots are shown as the table lists them, P p a head.

    Bytes: N p (D + V) itemsize for the pool, 4 M for its positions, 4 (P + 1) a KV head for table and count.

    Attributes:
        keys, values: the pool; keys rotated; as the layout holds them.
        slots: true positions in the pool, in one run of whole lanes, since a TPU would pad rows of p: M is N p or up to
            127 more. What lies beyond a head's count means nothing.
        table: page of each run of p tokens, -1 for none.
        used: tokens that a head holds.
        room: static; new tokens a head has pages for, beyond those it was made with.
        layout: how keys and values lie in memory.
    """

    keys: Float[Array, "N p m"]
    values: Float[Array, "N p n"]
    slots: Int[Array, "M"]
    table: Int[Array, "B G P"]
    used: Int[Array, "B G"]
    rotary: Rotary
    room: int = static()
    layout: Layout = static(APART)

    @classmethod
    def pack(
        cls, tokens: Tokens, mask: Bool[Array, "B G T"], pages: int, *, page: int, longest: int, room: int
    ) -> "Pages":
        """The tokens in `mask`, in order.

        Args:
            pages: N, at least the sum of `pages_for` over rows and heads.
            longest: the most tokens of the mask a head may hold.
        """
        tokens, mask = tokens.with_form(rotated=True), mask & tokens.present
        used = jnp.sum(mask, axis=-1, dtype=jnp.int32)
        layout = layout_for(tokens, by_rows=True)

        def empty(array):
            return jnp.zeros((pages, page, array.shape[-1]), array.dtype)

        pool = cls(
            *layout.hold((empty(tokens.keys), empty(tokens.values))),
            _no_tokens(pages * page),
            _handed_out(pages_for(used, page, room), -(-(longest + room) // page)),
            used,
            tokens.rotary,
            room,
            layout,
        )
        return pool._written(tokens, mask, jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1)

    def fork(self, copies: int) -> Forked:
        """Every row `copies` times: they share these pages, and have room for as many new tokens each."""
        rows, heads = self.used.shape[0] * copies, self.used.shape[1]
        width = max(-(-self.room // self.page), 1)
        pages = rows * heads * width
        own = replace(
            self,
            keys=jnp.zeros((pages, *self.keys.shape[1:]), self.keys.dtype),
            values=jnp.zeros((pages, *self.values.shape[1:]), self.values.dtype),
            slots=_no_tokens(pages * self.page),
            table=jnp.arange(pages, dtype=jnp.int32).reshape(rows, heads, width),
            used=jnp.zeros((rows, heads), jnp.int32),
            rotary=jax.tree.map(jnp.copy, self.rotary),  # the own store is donated, the shared one is not
        )
        return Forked((Shared(self),), own)

    @property
    def page(self) -> int:
        """Slots a page."""
        return self.keys.shape[1]

    def append(self, tokens: Tokens) -> "Pages":
        """Any number of tokens at once, while there is room; of a row's tokens, those that are present come first."""
        coming = tokens.present
        place = self.used[..., None] + jnp.cumsum(coming, axis=-1, dtype=jnp.int32) - 1
        after = self._written(tokens.with_form(rotated=True), coming, place)
        return replace(after, used=self.used + jnp.sum(coming, axis=-1, dtype=jnp.int32))

    def read(self, query: Query) -> Partial:
        return paged_decode_attention(
            query.rotated,
            self.keys,
            held_values(self.values),
            self.table,
            self.used,
            query.positions,
            self.slots,
            value_dim=query.spec.value_dim,
            **query.masking,
        )

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        width = self._per_turn() * self.page

        def turn(step: Int[Array, ""], everything: Array) -> Array:
            keys, _, slots = self._turn(step)
            part = decode_probabilities(query.rotated, keys, query.positions, slots, lse, **query.masking)
            return jax.lax.dynamic_update_slice_in_dim(everything, part, step * width, axis=-1)

        slots = self.table.shape[-1] * self.page
        nothing = jnp.zeros((*query.raw.shape[:4], -(-slots // width) * width), jnp.float32)
        return jax.lax.fori_loop(0, self._turns(), turn, nothing)[..., :slots]

    def crop(self, next: Int[Array, "B"]) -> "Pages":
        """Without the tokens at or beyond these positions, as if they had never come; they are a head's newest."""
        positions = self.positions()
        return replace(self, used=jnp.sum((positions >= 0) & (positions < next[:, None, None]), -1, dtype=jnp.int32))

    def tokens(self) -> Tokens:
        keys, values, positions = self._pages(jnp.arange(self.table.shape[-1]))
        return Tokens(keys, values, positions, self.rotary)

    def positions(self) -> Int[Array, "B G C"]:
        return self._positions(jnp.arange(self.table.shape[-1]))

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.attended_values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return {}

    def bytes_read(self) -> Int[Array, ""]:
        """Of the pages that hold a token, and the tables."""
        pages = jnp.sum(pages_for(self.used, self.page, 0))
        one = nbytes((self.keys, self.values)) // len(self.keys) + self.page * self.slots.itemsize
        return pages * one + self.table.nbytes + self.used.nbytes

    def _written(self, tokens: Tokens, which: Bool[Array, "B G T"], place: Int[Array, "B G T"]) -> "Pages":
        """The tokens in `which` written at their places in the order of their head; without a page nothing is."""
        run = place // self.page
        inside = which & (run >= 0) & (run < self.table.shape[-1])
        pages = jnp.take_along_axis(self.table, jnp.where(inside, run, 0), axis=-1)
        inside = inside & (pages >= 0)
        # Beyond the pool, which no write reaches; each at its own index, since a scatter is promised distinct ones.
        beyond = jnp.arange(place.size, dtype=jnp.int32).reshape(place.shape)
        where = jnp.where(inside, pages, len(self.keys) + beyond), place % self.page
        slot = jnp.where(inside, pages * self.page + place % self.page, len(self.slots) + beyond)

        def write(array, value, where=where):
            return array.at[where].set(value.astype(array.dtype), mode="drop", unique_indices=True)

        keys, values = self.layout.hold((tokens.keys, tokens.values))
        return replace(
            self,
            keys=write(self.keys, keys),
            values=write(self.values, values),
            slots=write(self.slots, tokens.positions, slot),
        )

    def _per_turn(self) -> int:
        """Pages of a head that are scored at a time."""
        return max(TURN // self.page, 1)

    def _turns(self) -> Int[Array, ""]:
        width = self._per_turn() * self.page
        return (jnp.max(self.used, initial=0) + width - 1) // width

    def _turn(self, step: Int[Array, ""]) -> tuple[Array, Array, Int[Array, "B G C"]]:
        return self._pages(step * self._per_turn() + jnp.arange(self._per_turn()))

    def _positions(self, runs: Int[Array, "n"]) -> Int[Array, "B G C"]:
        """True positions of the tokens in some runs of a page each; -1 for those that are not there."""
        place = (runs[:, None] * self.page + jnp.arange(self.page)).reshape(-1)
        slots = self.slots[slots_of(self._page_of(runs), self.page)].reshape(*self.used.shape, -1)
        return jnp.where(place < self.used[..., None], slots, -1)

    def _pages(self, runs: Int[Array, "n"]) -> tuple[Array, Array, Int[Array, "B G C"]]:
        """Keys, values and positions of some runs; zeros where there is no token, since 0 * nan would be nan."""
        positions, pages = self._positions(runs), self._page_of(runs)

        def present(array):
            return jnp.where((positions >= 0)[..., None], array[pages].reshape(*positions.shape, array.shape[-1]), 0)

        return *self.layout.show((present(self.keys), present(self.values))), positions

    def _page_of(self, runs: Int[Array, "n"]) -> Int[Array, "B G n"]:
        """In range also where there is none: what is read there is not used."""
        return jnp.maximum(self.table[..., jnp.minimum(runs, self.table.shape[-1] - 1)], 0)


def pages_for(used: Int[Array, "*batch"], page: int, room: int) -> Int[Array, "*batch"]:
    """Pages that hold so many tokens and room for more."""
    return (used + room + page - 1) // page


def _no_tokens(slots: int) -> Int[Array, "M"]:
    """Positions of so many empty slots, and of more that fill whole lanes."""
    return jnp.full((round_up(slots, LANES),), -1, jnp.int32)


def _handed_out(count: Int[Array, "B G"], width: int) -> Int[Array, "B G P"]:
    """A table that gives every head its own pages, one run after the other."""
    start = (jnp.cumsum(count.reshape(-1)) - count.reshape(-1)).reshape(*count.shape, 1)
    index = jnp.arange(width)
    return jnp.where(index < count[..., None], start + index, -1).astype(jnp.int32)
