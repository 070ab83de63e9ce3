"""The paged store: everything kept, in pages with key bounds; a read touches the most promising pages."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.kernels.decode_attention import decode_probabilities
from kvx.kernels.merge_partials import Partial
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stores.dense import Dense, first_empty
from kvx.stores.over_dense import OverDense
from kvx.tokens import Tokens


@pytree
class Paged(OverDense):
    """A dense store cut into pages of `page` slots, with the minimum and maximum of each page's keys per channel.

    A page's largest possible logit is sum_d max(q_d high_d, q_d low_d) = relu(q) . high - relu(-q) . low (Quest, Tang
    et al. 2024, equation 2): two matmuls over one row a page.

    Attributes:
        inner: the slots, a whole number of pages.
        low, high: bounds of the keys present; (+inf, -inf) for an empty page, so that padding never enters.
        budget: pages read per row, the newest token's page included.
        most: static bound on `budget`.
        group: how the query heads of a KV head share one choice of pages: "max" or "mean" of their bounds.
    """

    inner: Dense
    low: Float[Array, "B G P D"]
    high: Float[Array, "B G P D"]
    budget: Int[Array, "B"]
    page: int = static()
    most: int = static()
    group: str = static("max")

    @classmethod
    def pack(
        cls,
        tokens: Tokens,
        mask: Bool[Array, "B G T"],
        capacity: int,
        *,
        page: int,
        budget: Int[Array, "B"],
        most: int,
        group: str = "max",
    ) -> "Paged":
        """The tokens in `mask`, gathered in order into whole pages."""
        inner = Dense.pack(tokens.with_form(rotated=True), mask, -(-capacity // page) * page)
        low, high = _bounds(_paged(inner.keys, page), _paged(inner.slots, page))
        return cls(inner, low, high, budget, page, min(most, low.shape[2]), group)

    def append(self, tokens: Tokens) -> "Paged":
        slot = first_empty(self.inner.slots)
        inner = self.inner.append(tokens)
        # The page is bounded anew from its slots, since a reused slot may have held an extreme.
        index = jnp.minimum(slot // self.page, self.low.shape[2] - 1)[..., None]
        low, high = _bounds(self._pages(inner.keys, index), self._pages(inner.slots, index))
        batch, heads = jnp.ogrid[: index.shape[0], : index.shape[1]]
        where = (batch, heads, index[..., 0])
        return replace(
            self,
            inner=inner,
            low=self.low.at[where].set(low[:, :, 0], unique_indices=True, indices_are_sorted=True),
            high=self.high.at[where].set(high[:, :, 0], unique_indices=True, indices_are_sorted=True),
        )

    def read(self, query: Query) -> Partial:
        index, chosen = self.choose(query)
        keys, values = (self._pages(array, index) for array in (self.inner.keys, self.inner.values))
        slots = self._chosen_slots(index, chosen)
        return query.attend(_merged(keys), _merged(values), slots)

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        index, chosen = self.choose(query)
        keys = _merged(self._pages(self.inner.keys, index))
        slots = self._chosen_slots(index, chosen)
        read = decode_probabilities(query.rotated, keys, query.positions, slots, lse, **query.masking)
        read = jnp.moveaxis(read, -1, 2).reshape(*index.shape, self.page, *read.shape[2:4])
        batch, heads = jnp.ogrid[: index.shape[0], : index.shape[1]]
        everything = jnp.zeros((*self.low.shape[:3], *read.shape[3:]), read.dtype)
        everything = everything.at[batch[..., None], heads[..., None], index].set(read)
        return jnp.moveaxis(everything.reshape(*everything.shape[:2], -1, *read.shape[4:]), 2, -1)

    def choose(self, query: Query) -> tuple[Int[Array, "B G N"], Bool[Array, "B G N"]]:
        """The pages to read, best first, and which of them the row's budget allows; the newest token's page always."""
        bounds = self.bounds(query)
        newest = _paged(self.inner.slots == jnp.max(query.positions, axis=1)[:, None, None], self.page).any(axis=-1)
        _, index = jax.lax.top_k(jnp.where(newest, jnp.inf, bounds), self.most)
        return index, jnp.broadcast_to(jnp.arange(self.most) < self.budget[:, None, None], index.shape)

    def bounds(self, query: Query) -> Float[Array, "B G P"]:
        """Upper bound of each page's unscaled logits, reduced over query heads and queries; -inf for an empty page."""
        batch, kv_heads, group, length, dim = query.raw.shape
        rows = query.rotated.reshape(batch, kv_heads, group * length, dim).astype(jnp.float32)
        empty = jnp.isinf(self.low[..., :1])
        high, low = (jnp.where(empty, 0.0, bound) for bound in (self.high, self.low))
        raised = jnp.einsum("bgtd,bgpd->bgtp", jax.nn.relu(rows), high, preferred_element_type=jnp.float32)
        lowered = jnp.einsum("bgtd,bgpd->bgtp", jax.nn.relu(-rows), low, preferred_element_type=jnp.float32)
        reduce = jnp.max if self.group == "max" else jnp.mean
        return jnp.where(empty[..., 0], -jnp.inf, reduce(raised - lowered, axis=2))

    def bytes_read(self) -> int:
        slots = self.inner.slots.shape[-1]
        read = min(self.most * self.page, slots)
        rows = self.inner.keys.nbytes + self.inner.values.nbytes
        return rows * read // slots + self.low.nbytes + self.high.nbytes + self.inner.slots.nbytes

    def _pages(self, array: Array, index: Int[Array, "B G N"]) -> Array:
        """Whole pages of a per-slot array."""
        pages = _paged(array, self.page)
        return jnp.take_along_axis(pages, index.reshape(*index.shape, *[1] * (pages.ndim - 3)), axis=2)

    def _chosen_slots(self, index: Int[Array, "B G N"], chosen: Bool[Array, "B G N"]) -> Int[Array, "B G M"]:
        return _merged(jnp.where(chosen[..., None], self._pages(self.inner.slots, index), -1))


def _paged(array: Array, page: int) -> Array:
    """(B, G, C, ...) as (B, G, P, page, ...)."""
    return array.reshape(*array.shape[:2], array.shape[2] // page, page, *array.shape[3:])


def _merged(pages: Array) -> Array:
    """(B, G, N, page, ...) as (B, G, N * page, ...)."""
    return pages.reshape(*pages.shape[:2], pages.shape[2] * pages.shape[3], *pages.shape[4:])


def _bounds(
    keys: Float[Array, "B G P page D"], slots: Int[Array, "B G P page"]
) -> tuple[Float[Array, "B G P D"], Float[Array, "B G P D"]]:
    """Elementwise minimum and maximum of the keys present."""
    present = (slots >= 0)[..., None]
    return jnp.min(jnp.where(present, keys, jnp.inf), axis=3), jnp.max(jnp.where(present, keys, -jnp.inf), axis=3)
