"""The renumbered store: unrotated keys, rotated at every read by their place in the cache instead of in the text."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.kernels.merge_partials import Partial
from kvx.pytree import pytree
from kvx.query import Query
from kvx.stores.dense import Dense
from kvx.stores.layout import layout_for
from kvx.stores.over_dense import OverDense
from kvx.stores.slots import write_slot
from kvx.tokens import Tokens


@pytree
class Renumbered(OverDense):
    """A dense store of unrotated keys with every slot's place among the tokens held, by age (StreamingLLM).

    The model never sees a distance larger than the cache, so a text may be longer than its positions. Rotating from
    unrotated keys, in float32, avoids the drift of keys that are turned back at every eviction.

    Attributes:
        inner: the slots.
        places: 0 for the oldest token held, count - 1 for the newest.
    """

    inner: Dense
    places: Int[Array, "B G C"]

    @classmethod
    def pack(cls, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int) -> "Renumbered":
        """The tokens in `mask`, gathered in order."""
        inner = Dense.pack(tokens.with_form(rotated=False), mask, capacity, layout=layout_for(tokens))
        return cls(inner, jnp.broadcast_to(jnp.arange(inner.slots.shape[-1], dtype=jnp.int32), inner.slots.shape))

    def append(self, tokens: Tokens) -> "Renumbered":
        slot = jnp.min(
            jnp.where(self.inner.slots < 0, jnp.arange(self.places.shape[-1]), self.places.shape[-1]), axis=-1
        )
        return replace(self, inner=self.inner.append(tokens), places=write_slot(self.places, slot, self._count()))

    def read(self, query: Query) -> Partial:
        return self._turned().read(query, self._at_newest(query))

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        return self._turned().probabilities(query, lse, self._at_newest(query))

    def release(self, scores: Float[Array, "B G C"], excess: Int[Array, "B G"], most: int = 1) -> "Renumbered":
        inner = self.inner.release(scores, excess, most)
        gone = (self.inner.slots >= 0) & (inner.slots < 0)
        # Every token moves down by as many places as have become free below it.
        if most == 1:
            place = jnp.min(jnp.where(gone, self.places, jnp.iinfo(jnp.int32).max), axis=-1, keepdims=True)
            return Renumbered(inner, self.places - (self.places > place))
        below = gone[..., None, :] & (self.places[..., None, :] < self.places[..., None])
        return Renumbered(inner, self.places - jnp.sum(below, axis=-1, dtype=jnp.int32))

    def write_values(self, slots: Int[Array, "B G n"], values: Float[Array, "B G n V"]) -> "Renumbered":
        """As `Dense.write_values`."""
        return replace(self, inner=self.inner.write_values(slots, values))

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        return self._turned().dense()

    def _count(self) -> Int[Array, "B G"]:
        return jnp.sum(self.inner.slots >= 0, axis=-1, dtype=jnp.int32)

    def _turned(self) -> Dense:
        """The slots with keys rotated at their places."""
        held = self.inner.tokens()
        keys, values = self.inner.layout.hold((held.rotary(held.keys, self.places), held.values))
        return replace(self.inner, keys=keys, values=values, rotated=True)

    def _at_newest(self, query: Query) -> Float[Array, "B G R T D"]:
        """Queries at the places of the newest tokens."""
        length = query.raw.shape[3]
        newest = self._count()[..., None] - length + jnp.arange(length)
        return query.at(jnp.maximum(newest, 0))
