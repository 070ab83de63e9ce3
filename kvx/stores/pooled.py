"""The pooled store: one layer's run of slots inside a pool that several layers share.

When data decide how a conserved total splits over layers, separate arrays would have data-dependent shapes and compile
anew for nearly every prompt. One pool has a static total; each layer and row owns a run of it whose start and length
are data, and a read loops over as many blocks as the run has.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.kernels.decode_attention import decode_probabilities
from kvx.kernels.merge_partials import Partial
from kvx.kernels.ragged_decode_attention import ragged_decode_attention
from kvx.places import place
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.stores.base import nbytes
from kvx.stores.slots import weakest, write_slot
from kvx.tokens import Tokens, held_values

BLOCK = 128
"""Slots that are scored, or moved, per turn of a loop."""


@pytree
class Pool:
    """Slots of several layers' rotated keys and values; a layer's slots are one run in each row."""

    keys: Float[Array, "B G N D"]
    values: Float[Array, "B G N V"]
    slots: Int[Array, "B G N"]
    stats: dict[str, Float[Array, "B G N"]]

    @classmethod
    def empty(cls, tokens: Tokens, total: int) -> "Pool":
        """A pool of `total` slots a head, shaped like these tokens."""
        batch, heads = tokens.positions.shape[:2]

        def zeros(width, dtype):
            return jnp.zeros((batch, heads, total, width), dtype)

        return cls(
            zeros(tokens.keys.shape[-1], tokens.keys.dtype),
            zeros(tokens.values.shape[-1], tokens.values.dtype),
            jnp.full((batch, heads, total), -1, jnp.int32),
            {name: jnp.zeros((batch, heads, total), jnp.float32) for name in tokens.stats},
        )

    def relaid(self, source: Int[Array, "B G N"], tokens: Tokens, arriving: Int[Array, "B G N"]) -> "Pool":
        """Every slot filled anew: with the token `arriving`, else from the slot `source`; -1 and -1: empty.

        A source never comes before its slot, so that a sweep from the front, block by block, reads nothing that it has
        overwritten: neither a second pool nor a copy of the tokens is needed.
        """
        total, coming = self.slots.shape[-1], tokens.with_form(rotated=True)
        incoming = Pool(coming.keys, coming.values, coming.positions, dict(coming.stats))
        width = min(BLOCK, total)

        def move(at: Int[Array, ""] | int, width: int, pool: Pool) -> Pool:
            here, new = (jax.lax.dynamic_slice_in_dim(each, at, width, axis=2) for each in (source, arriving))

            def one(array, fresh):
                beyond = (1,) * (array.ndim - 3)
                held, came = (index.reshape(*index.shape, *beyond) for index in (here, new))
                rows = jnp.where(
                    came >= 0,
                    jnp.take_along_axis(fresh, jnp.maximum(came, 0), axis=2).astype(array.dtype),
                    jnp.take_along_axis(array, jnp.maximum(held, 0), axis=2),
                )
                return jax.lax.dynamic_update_slice_in_dim(array, rows, at, axis=2)

            return jax.tree.map(one, pool, incoming)

        first = total % width
        pool = move(0, first, self)
        pool = jax.lax.fori_loop(0, total // width, lambda turn, pool: move(first + turn * width, width, pool), pool)
        return replace(pool, slots=jnp.where((source >= 0) | (arriving >= 0), pool.slots, -1))


@pytree
class Pooled:
    """A layer's view of the pool; its slots are numbered from 0 within its own run.

    Attributes:
        pool: the slots of all layers that share it.
        start, length: this layer's run in each row.
        capacity: static bound on any layer's length.
    """

    pool: Pool
    rotary: Rotary
    start: Int[Array, "B"]
    length: Int[Array, "B"]
    capacity: int = static()

    @classmethod
    def pack(
        cls,
        tokens: Tokens,
        mask: Bool[Array, "B G T"],
        pool: Pool,
        start: Int[Array, "B"],
        length: Int[Array, "B"],
        capacity: int,
    ) -> "Pooled":
        """The tokens in `mask` (at most `length` a head), written to the row's own run of the pool."""
        kept = tokens.with_form(rotated=True).select(mask, capacity)
        view = cls(pool, tokens.rotary, start, length, capacity)
        batch, heads = jnp.ogrid[: mask.shape[0], : mask.shape[1]]
        where = (batch[..., None], heads[..., None], view._places()[:, None])

        def write(array, value):
            return array.at[where].set(value.astype(array.dtype), mode="drop")

        return replace(
            view,
            pool=Pool(
                write(pool.keys, kept.keys),
                write(pool.values, kept.values),
                write(pool.slots, kept.positions),
                {name: write(stat, kept.stats[name]) for name, stat in pool.stats.items()},
            ),
        )

    def append(self, tokens: Tokens) -> "Pooled":
        empty = jnp.where((self.positions() < 0) & self._owned()[:, None], jnp.arange(self.capacity), self.capacity)
        return self._write(jnp.min(empty, axis=-1), tokens.with_form(rotated=True))

    def read(self, query: Query) -> Partial:
        batch, heads = self.pool.slots.shape[:2]

        def alone(array: Shaped[Array, "B G *rest"]) -> Shaped[Array, "BG *rest"]:
            """Each head of a row as a row of its own: its run lies among its own slots."""
            return array.reshape(batch * heads, *array.shape[2:])

        def each(array: Shaped[Array, "B *rest"]) -> Shaped[Array, "BG *rest"]:
            return jnp.repeat(array, heads, axis=0)

        values = held_values(self.pool.values)
        part = ragged_decode_attention(
            alone(query.rotated)[:, None],
            alone(self.pool.keys),
            None if values is None else alone(values),
            each(self.start)[:, None],
            each(self.length)[:, None],
            each(query.positions),
            alone(self.pool.slots),
            value_dim=query.spec.value_dim,
            longest=min(self.capacity, self.pool.slots.shape[-1]),
            **query.masking,
        )
        shape = query.raw.shape[:4]
        return Partial(part.out.reshape(*shape, -1), part.lse.reshape(shape))

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        def step(block, everything):
            keys, _, slots = self._block(block)
            part = decode_probabilities(query.rotated, keys, query.positions, slots, lse, **query.masking)
            return jax.lax.dynamic_update_slice_in_dim(everything, part, block * BLOCK, axis=-1)

        width = -(-self.capacity // BLOCK) * BLOCK
        nothing = jnp.zeros((*query.raw.shape[:4], width), jnp.float32)
        return jax.lax.fori_loop(0, self._blocks(), step, nothing)[..., : self.capacity]

    def release(self, scores: Float[Array, "B G C"], excess: Int[Array, "B G"], most: int = 1) -> "Pooled":
        assert most == 1, "a pool's layers let one token go at a time"
        return self.evict(weakest(scores, self.positions()), excess > 0)

    def evict(self, slot: Int[Array, "B G"], when: Bool[Array, "B G"]) -> "Pooled":
        """Mark one slot a head empty where `when`."""
        gone = write_slot(self.pool.slots, self._target(slot, when), jnp.full_like(slot, -1))
        return replace(self, pool=replace(self.pool, slots=gone))

    def take(self, slot: Int[Array, "B G"], when: Bool[Array, "B G"]) -> Tokens:
        """One token a head, "no token" where not `when`."""
        return self.tokens().take(slot[..., None], when[..., None])

    def write(self, slot: Int[Array, "B G"], tokens: Tokens, when: Bool[Array, "B G"]) -> "Pooled":
        """One token a head overwritten where `when`; its statistics stay."""
        target = self._target(slot, when)
        keys = write_slot(self.pool.keys, target, tokens.with_form(rotated=True).keys[:, :, 0])
        values = write_slot(self.pool.values, target, tokens.values[:, :, 0])
        return replace(self, pool=replace(self.pool, keys=keys, values=values))

    def tokens(self) -> Tokens:
        index = jnp.minimum(self._places(), self.pool.slots.shape[-1] - 1)[:, None]

        def view(array):
            return jnp.take_along_axis(array, index.reshape(*index.shape, *[1] * (array.ndim - 3)), axis=2)

        pool = self.pool
        stats = {name: view(stat) for name, stat in pool.stats.items()}
        return Tokens(view(pool.keys), view(pool.values), self.positions(), self.rotary, stats)

    def positions(self) -> Int[Array, "B G C"]:
        index = jnp.minimum(self._places(), self.pool.slots.shape[-1] - 1)[:, None]
        return jnp.where(self._owned()[:, None], jnp.take_along_axis(self.pool.slots, index, axis=2), -1)

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.attended_values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return dict(self.tokens().stats)

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "Pooled":
        batch, heads = jnp.ogrid[: self.start.shape[0], : self.pool.slots.shape[1]]
        where = (batch[..., None], heads[..., None], self._places()[:, None])
        written = {name: stat.at[where].set(stats[name], mode="drop") for name, stat in self.pool.stats.items()}
        return replace(self, pool=replace(self.pool, stats=written))

    def bytes_read(self) -> int:
        slots = self.pool.slots
        return nbytes(self.pool) * int(jnp.sum(self.length)) // (slots.shape[0] * slots.shape[2])

    def _write(self, slot: Int[Array, "B G"], tokens: Tokens) -> "Pooled":
        target, pool = self._target(slot, slot < self.capacity), self.pool
        return replace(
            self,
            pool=Pool(
                write_slot(pool.keys, target, tokens.keys[:, :, 0]),
                write_slot(pool.values, target, tokens.values[:, :, 0]),
                write_slot(pool.slots, target, tokens.positions[:, :, 0]),
                {name: write_slot(stat, target, tokens.stats[name][:, :, 0]) for name, stat in pool.stats.items()},
            ),
        )

    def _target(self, slot: Int[Array, "B G"], when: Bool[Array, "B G"]) -> Int[Array, "B G"]:
        """Where a slot is in the pool; beyond its end, which no write reaches, where not `when`."""
        return jnp.where(when, self.start[:, None] + slot, self.pool.slots.shape[-1])

    def _owned(self) -> Bool[Array, "B C"]:
        return jnp.arange(self.capacity) < self.length[:, None]

    def _places(self) -> Int[Array, "B C"]:
        """Pool index of each of this layer's slots; beyond the pool for those past its run."""
        index = self.start[:, None] + jnp.arange(self.capacity)
        return jnp.where(self._owned(), index, self.pool.slots.shape[-1])

    def _blocks(self) -> Int[Array, ""]:
        return (jnp.max(self.length) + BLOCK - 1) // BLOCK

    def _block(self, block: Int[Array, ""]) -> tuple[Array, Array, Int[Array, "B G S"]]:
        """Keys, values and positions of a run of BLOCK slots, -1 beyond the row's own run."""
        offset = block * BLOCK + jnp.arange(BLOCK)
        index = jnp.minimum(self.start[:, None] + offset, self.pool.slots.shape[-1] - 1)[:, None]
        slots = jnp.take_along_axis(self.pool.slots, index, axis=2)
        slots = jnp.where((offset < self.length[:, None])[:, None], slots, -1)
        rows = index[..., None]
        keys, values = (jnp.take_along_axis(array, rows, axis=2) for array in (self.pool.keys, self.pool.values))
        return keys, values, slots


@pytree
class Run:
    """Where a pooled layer lives: a run of the pool in one storage slot."""

    rotary: Rotary
    start: Int[Array, "B"]
    length: Int[Array, "B"]
    capacity: int = static()
    slot: int = static()

    @property
    def shared(self) -> bool:
        """Every layer of the pool adds its run."""
        return True

    def load(self, storage: tuple) -> Pooled:
        """The layer's view."""
        return Pooled(storage[self.slot], self.rotary, self.start, self.length, self.capacity)

    def save(self, storage: tuple, store: Pooled) -> tuple:
        """Storage with the pool as the layer left it."""
        return (*storage[: self.slot], store.pool, *storage[self.slot + 1 :])


@place.register(Pooled)
def _(store: Pooled, storage: tuple) -> tuple[Run, tuple]:
    """The pool is stored once; as layers are packed one after the other, each sees what the one before it left."""
    slot = next((index for index, held in enumerate(storage) if isinstance(held, Pool)), len(storage))
    run = Run(store.rotary, store.start, store.length, store.capacity, slot)
    return run, run.save(storage, store)
