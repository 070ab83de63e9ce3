"""The flat store: heads of different lengths in one run of slots, so that per-head budgets save real memory."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, Shaped

from kvx.kernels.logits import partial_softmax, scaled_logits, slot_probabilities, visible
from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.pytree import pytree
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.stores.base import nbytes
from kvx.stores.dense import Dense
from kvx.tokens import Tokens, concatenate


@pytree
class Flat:
    """N slots shared by all KV heads of a layer, each owned by one head, and a rectangular tail for new tokens.

    The total N is static, the split over heads is data. Reading multiplies all query heads with all slots and masks
    the foreign ones: one matmul that reads every key once; on a CPU cheaper than gathering by head.

    `dense()` shows every slot to every head, at position -1 where it belongs to another.

    Attributes:
        keys, values: rotated keys and values.
        owners: KV head of each slot.
        slots: true positions, -1 where empty.
        tail: tokens appended since, one slot per head each, so that appending never moves the run.
    """

    keys: Float[Array, "B N D"]
    values: Float[Array, "B N V"]
    owners: Int8[Array, "B N"]
    slots: Int[Array, "B N"]
    rotary: Rotary
    tail: Dense

    @classmethod
    def pack(cls, tokens: Tokens, mask: Bool[Array, "B G T"], total: int, room: int) -> "Flat":
        """The tokens in `mask`, at most `total` over all heads, head after head; `room` slots a head for new ones."""
        tokens = tokens.with_form(rotated=True)
        batch, heads, length = mask.shape

        def flat(array):
            return array.reshape(batch, 1, heads * length, *array.shape[3:])

        run = replace(
            tokens,
            keys=flat(tokens.keys),
            values=flat(tokens.values),
            positions=flat(tokens.positions),
            stats={"owner": flat(jnp.broadcast_to(jnp.arange(heads, dtype=jnp.float32)[:, None], mask.shape))},
        ).select(flat(mask), total)
        tail = Dense.pack(tokens, jnp.zeros_like(mask), room)
        return cls(
            run.keys[:, 0],
            run.values[:, 0],
            run.stats["owner"][:, 0].astype(jnp.int8),
            run.positions[:, 0],
            tokens.rotary,
            tail,
        )

    def append(self, tokens: Tokens) -> "Flat":
        return replace(self, tail=self.tail.append(tokens))

    def read(self, query: Query) -> Partial:
        part = partial_softmax(self._logits(query), self.values)
        shape = query.raw.shape[:4]
        run = Partial(part.out.reshape(*shape, -1), part.lse.reshape(shape))
        return merge_partials(run, self.tail.read(query))

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        logits = self._logits(query).reshape(*query.raw.shape[:4], -1)
        run = slot_probabilities(logits, lse)
        return jnp.concatenate([run, self.tail.probabilities(query, lse)], axis=-1)

    def tokens(self) -> Tokens:
        heads = self.tail.slots.shape[1]

        def shared(array):
            return jnp.broadcast_to(array[:, None], (array.shape[0], heads, *array.shape[1:]))

        run = Tokens(shared(self.keys), shared(self.values), self._owned(), self.rotary)
        return concatenate(run, self.tail.tokens())

    def positions(self) -> Int[Array, "B G C"]:
        return jnp.concatenate([self._owned(), self.tail.slots], axis=-1)

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return {}

    def bytes_read(self) -> int:
        return nbytes(self)

    def _owned(self) -> Int[Array, "B G N"]:
        """Positions as each head sees them."""
        heads = jnp.arange(self.tail.slots.shape[1], dtype=jnp.int8)
        return jnp.where(self.owners[:, None] == heads[:, None], self.slots[:, None], -1)

    def _logits(self, query: Query) -> Float[Array, "B GRT N"]:
        batch, kv_heads, group, length, dim = query.raw.shape
        rows = query.rotated.reshape(batch, kv_heads * group * length, dim)
        logits = scaled_logits(rows, self.keys, query.spec.scale, query.spec.softcap)
        seen = visible(query.positions[:, None, None, :, None], self._owned()[:, :, None, None, :], query.spec.window)
        seen = jnp.broadcast_to(seen, (batch, kv_heads, group, length, seen.shape[-1]))
        return jnp.where(seen.reshape(logits.shape), logits, -jnp.inf)
