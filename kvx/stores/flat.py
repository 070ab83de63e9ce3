"""The flat store: the heads of a layer share one run of slots, so that heads of different length save real memory."""

from dataclasses import field, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, Shaped

from kvx.kernels.logits import partial_softmax, scaled_logits, slot_probabilities, visible
from kvx.kernels.merge_partials import Partial
from kvx.kernels.ragged_decode_attention import ragged_decode_attention
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.stores.base import nbytes
from kvx.stores.layout import APART, Layout, layout_for
from kvx.stores.slots import empty_slots, scatter, weakest_several
from kvx.tokens import Tokens, attended_values, held_values


@pytree
class Flat:
    """N slots shared by all KV heads of a layer; a slot belongs to one head while it holds a token.

    The total N is static, the split over heads is data. A fresh token of every head goes into the next empty slots,
    whoever freed them. Reading multiplies all query heads with all slots and masks the foreign ones: one matmul that
    reads every key once; on a CPU cheaper than gathering by head. A store that is closed keeps each head's tokens in a
    run, so that a kernel reads no foreign one.

    `dense()` shows every slot to every head, at position -1 where it belongs to another.

    Bytes per slot: (D + V) * itemsize + 4 for the position + 1 for the owner + its statistics.

    Attributes:
        keys, values: rotated keys and values, as the layout holds them.
        owners: KV head of each slot.
        slots: true positions, -1 where empty.
        heads: KV heads of the layer.
        shared_stats: statistics by slot.
        starts, lengths: of a store that nothing is appended to, each head's run of slots, which is read alone; else
            None.
        layout: how keys and values lie in memory.
    """

    keys: Float[Array, "B N m"]
    values: Float[Array, "B N n"]
    owners: Int8[Array, "B N"]
    slots: Int[Array, "B N"]
    rotary: Rotary
    heads: int = static()
    shared_stats: dict[str, Shaped[Array, "B N"]] = field(default_factory=dict)
    starts: Int[Array, "B G"] | None = None
    lengths: Int[Array, "B G"] | None = None
    layout: Layout = static(APART)

    @classmethod
    def pack(cls, tokens: Tokens, mask: Bool[Array, "B G T"], total: int, *, closed: bool = False) -> "Flat":
        """The tokens in `mask`, at most `total` over all heads, head after head; `closed`: no other comes."""
        tokens = tokens.with_form(rotated=True)
        batch, heads, length = mask.shape

        def flat(array):
            return array.reshape(batch, 1, heads * length, *array.shape[3:])

        owners = jnp.broadcast_to(jnp.arange(heads, dtype=jnp.int8)[:, None], mask.shape)
        run = replace(
            tokens,
            keys=flat(tokens.keys),
            values=flat(tokens.values),
            positions=flat(tokens.positions),
            stats={name: flat(stat) for name, stat in {**tokens.stats, "owner": owners}.items()},
        ).select(flat(mask), total)
        stats = {name: stat[:, 0] for name, stat in run.stats.items()}
        owner = stats.pop("owner")
        rows = run.keys[:, 0], run.values[:, 0]
        store = cls(*rows, owner, run.positions[:, 0], tokens.rotary, heads, stats)
        if not closed:
            return store
        layout = layout_for(tokens, by_rows=True)
        keys, values = layout.hold(rows)
        ends = jnp.minimum(jnp.cumsum(jnp.sum(mask & tokens.present, axis=-1), axis=1), total).astype(jnp.int32)
        starts = jnp.pad(ends, ((0, 0), (1, 0)))[:, :-1]
        return replace(store, keys=keys, values=values, starts=starts, lengths=ends - starts, layout=layout)

    def append(self, tokens: Tokens) -> "Flat":
        """A token of every head (or several), while there are as many empty slots."""
        assert self.starts is None, "a closed store's runs hold what they were packed with"
        tokens = tokens.with_form(rotated=True)
        batch, heads, count = tokens.positions.shape
        places = empty_slots(self.slots[:, None], heads * count)
        owners = jnp.broadcast_to(jnp.arange(heads, dtype=jnp.int8)[:, None], tokens.positions.shape)

        def put(array, rows):
            return scatter(array[:, None], places, rows.reshape(batch, 1, heads * count, *rows.shape[3:]))[:, 0]

        return replace(
            self,
            keys=put(self.keys, tokens.keys),
            values=put(self.values, tokens.values),
            owners=put(self.owners, owners),
            slots=put(self.slots, tokens.positions),
            shared_stats={name: put(stat, tokens.stats[name]) for name, stat in self.shared_stats.items()},
        )

    def read(self, query: Query) -> Partial:
        if self.starts is not None and self.lengths is not None:
            return ragged_decode_attention(
                query.rotated,
                self.keys,
                held_values(self.values),
                self.starts,
                self.lengths,
                query.positions,
                self.slots,
                value_dim=query.spec.value_dim,
                **query.masking,
            )
        part = partial_softmax(self._logits(query), attended_values(self.keys, self.values, self.rotary))
        shape = query.raw.shape[:4]
        return Partial(part.out.reshape(*shape, -1), part.lse.reshape(shape))

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        return slot_probabilities(self._logits(query).reshape(*query.raw.shape[:4], -1), lse)

    def release(self, scores: Float[Array, "B G C"], excess: Int[Array, "B G"], most: int = 1) -> "Flat":
        gone = jnp.any(weakest_several(scores, self.positions(), excess, most), axis=1)
        return replace(self, slots=jnp.where(gone, -1, self.slots))

    def tokens(self) -> Tokens:
        keys, values = (self._shown(array) for array in self.layout.show((self.keys, self.values)))
        return Tokens(keys, values, self.positions(), self.rotary, self.stats)

    def positions(self) -> Int[Array, "B G C"]:
        heads = jnp.arange(self.heads, dtype=jnp.int8)
        return jnp.where(self.owners[:, None] == heads[:, None], self.slots[:, None], -1)

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.attended_values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return {name: self._shown(stat) for name, stat in self.shared_stats.items()}

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "Flat":
        """The same store; of each slot, its owner's statistics."""
        owners = self.owners[:, None].astype(jnp.int32)
        held = {name: jnp.take_along_axis(stats[name], owners, axis=1)[:, 0] for name in self.shared_stats}
        return replace(self, shared_stats=held)

    def bytes_read(self) -> int:
        return nbytes(self)

    def _shown(self, array: Shaped[Array, "B N *rest"]) -> Shaped[Array, "B G N *rest"]:
        return jnp.broadcast_to(array[:, None], (array.shape[0], self.heads, *array.shape[1:]))

    def _logits(self, query: Query) -> Float[Array, "B GRT N"]:
        batch, kv_heads, group, length, dim = query.raw.shape
        rows = query.rotated.reshape(batch, kv_heads * group * length, dim)
        keys, _ = self.layout.show((self.keys, self.values))
        logits = scaled_logits(rows, keys, query.spec.scale, query.spec.softcap)
        seen = visible(
            query.positions[:, None, None, :, None], self.positions()[:, :, None, None, :], query.spec.window
        )
        seen = jnp.broadcast_to(seen, (batch, kv_heads, group, length, seen.shape[-1]))
        return jnp.where(seen.reshape(logits.shape), logits, -jnp.inf)
