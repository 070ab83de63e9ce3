"""The store of chosen slots: everything kept; one layer reads it all and chooses, others read what was chosen below."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.decode_attention import slot_logits, ungroup
from kvx.kernels.logits import partial_softmax
from kvx.kernels.merge_partials import Partial
from kvx.kernels.sparse_decode_attention import sparse_decode_attention
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stores.base import nbytes
from kvx.stores.dense import Dense
from kvx.stores.over_dense import OverDense
from kvx.tokens import held_values


@pytree
class Chosen(OverDense):
    """A dense store that knows how many of its slots a step reads.

    Slots mean the same tokens in every layer, since all append in one order and none lets go; so a choice of slots
    made in one layer serves another.

    Attributes:
        inner: the slots.
        budget: slots that a choice holds, per row.
        most: static bound on `budget`.
        recent: newest tokens that every choice holds, the query's own included.
        sets: choices of a KV head: one for each of its query heads, or one for all.
        group: by which of their probabilities query heads that share choose, "max" or "mean"; None: they do not share.
        sparse: it reads by choices from below, else all.
    """

    inner: Dense
    budget: Int[Array, "B"]
    most: int = static()
    recent: int = static()
    sets: int = static()
    group: str | None = static()
    sparse: bool = static()

    def read(self, query: Query) -> Partial:
        """Over every token, whatever was chosen."""
        return self.inner.read(query)

    def choose(self, query: Query) -> tuple[Partial, Int[Array, "B G N T M"]]:
        """Attention over every token, and the slots of the largest probabilities, best first; in a tie the lower slot.

        N is `sets`; -1 beyond the row's budget.
        """
        batch, heads, group, length, _ = query.raw.shape
        slots = self.inner.slots
        logits = slot_logits(query.rotated, self.inner.keys, query.positions, slots, **query.masking)
        part = ungroup(partial_softmax(logits, self.inner.tokens().attended_values), group)
        # As logarithms: a probability that is 0 in float32 still has its place in the order.
        lse = jnp.where(jnp.isfinite(part.lse), part.lse, 0.0)[..., None]
        scores = logits.reshape(batch, heads, group, length, -1) - lse
        if self.group == "max":
            scores = jnp.max(scores, axis=2, keepdims=True)
        elif self.group == "mean":
            scores = jax.nn.logsumexp(scores, axis=2, keepdims=True)
        age = query.positions[:, None, :, None] - slots[:, :, None]
        forced = (slots[:, :, None] >= 0) & (age >= 0) & (age < self.recent)
        _, index = jax.lax.top_k(jnp.where(forced[:, :, None], jnp.inf, scores), self.most)
        taken = jnp.arange(self.most) < self.budget[:, None, None, None, None]
        return part, jnp.where(taken, index, -1)

    def read_at(self, query: Query, chosen: Int[Array, "B G N T M"]) -> Partial:
        """Attention over these slots only: of each query head's choice, or its KV head's."""
        return sparse_decode_attention(
            query.rotated,
            self.inner.keys,
            held_values(self.inner.values),
            query.positions,
            self.inner.slots,
            chosen,
            page=1,
            value_dim=query.spec.value_dim,
            **query.masking,
        )

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        return self.inner.probabilities(query, lse)

    def crop(self, next: Int[Array, "B"]) -> "Chosen":
        """Without the tokens at or beyond these positions."""
        return replace(self, inner=self.inner.crop(next))

    def bytes_read(self) -> int:
        """Of a sparse layer: the keys and values of its choices, no slot counted twice, and every position."""
        if not self.sparse:
            return nbytes(self)
        keys, values, slots = self.inner.keys, self.inner.values, self.inner.slots
        rows = min(self.sets * self.most, slots.shape[-1])
        return (keys.nbytes + values.nbytes) * rows // slots.shape[-1] + slots.nbytes + self.budget.nbytes
