"""The paged store: everything kept, in pages with key bounds; a read touches the most promising pages."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.kernels.decode_attention import decode_probabilities
from kvx.kernels.merge_partials import Partial
from kvx.kernels.page_scores import page_scores
from kvx.kernels.sparse_decode_attention import sparse_decode_attention
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stores.dense import Dense
from kvx.stores.layout import layout_for, slots_by_rows
from kvx.stores.over_dense import OverDense
from kvx.stores.slots import first_empty, write_slot
from kvx.tokens import Tokens, held_values


@pytree
class Paged(OverDense):
    """A dense store cut into pages of `page` slots, with the minimum and maximum of each page's keys per channel.

    A page's largest possible logit is sum_d max(q_d high_d, q_d low_d) = relu(q) . high - relu(-q) . low (Quest, Tang
    et al. 2024, equation 2): two matmuls over one row a page.

    Attributes:
        inner: the slots, a whole number of pages.
        extremes: minimum of a page's keys, and behind it their maximum: what one product scores; +inf and -inf for an
            empty page, so that padding never enters.
        budget: pages read per row, the newest token's page included.
        most: static bound on `budget`.
        group: how the query heads of a KV head share one choice of pages: "max" or "mean" of their bounds.
    """

    inner: Dense
    extremes: Float[Array, "B G P E"]
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
        slots, layout = slots_by_rows(capacity, page), layout_for(tokens, by_rows=True)
        inner = Dense.pack(tokens.with_form(rotated=True), mask, slots, layout=layout)
        extremes = _extremes(_paged(inner.tokens().keys, page), _paged(inner.slots, page))
        return cls(inner, extremes, budget, page, min(most, extremes.shape[2]), group)

    def append(self, tokens: Tokens) -> "Paged":
        slot = first_empty(self.inner.slots)
        inner = self.inner.append(tokens)
        # The page is bounded anew from its slots, since a reused slot may have held an extreme.
        index = jnp.minimum(slot // self.page, self.extremes.shape[2] - 1)
        page = index[..., None]
        touched = self._pages(inner.keys, page), self._pages(inner.values, page)
        fresh = _extremes(inner.layout.show(touched)[0], self._pages(inner.slots, page))
        return replace(self, inner=inner, extremes=write_slot(self.extremes, index, fresh[:, :, 0]))

    def read(self, query: Query) -> Partial:
        index, chosen = self.choose(query)
        return sparse_decode_attention(
            query.rotated,
            self.inner.keys,
            held_values(self.inner.values),
            query.positions,
            self.inner.slots,
            jnp.where(chosen, index, -1)[:, :, None, None],
            page=self.page,
            value_dim=query.spec.value_dim,
            **query.masking,
        )

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        index, chosen = self.choose(query)
        held = _merged(self._pages(self.inner.keys, index)), _merged(self._pages(self.inner.values, index))
        queries, keys = self.inner.layout.asked(query.rotated, held)
        slots = self._chosen_slots(index, chosen)
        read = decode_probabilities(queries, keys, query.positions, slots, lse, **query.masking)
        read = jnp.moveaxis(read, -1, 2).reshape(*index.shape, self.page, *read.shape[2:4])
        batch, heads = jnp.ogrid[: index.shape[0], : index.shape[1]]
        everything = jnp.zeros((*self.extremes.shape[:3], *read.shape[3:]), read.dtype)
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
        return page_scores(query.rotated, self.extremes, group=self.group)

    def bytes_read(self) -> int:
        slots = self.inner.slots.shape[-1]
        read = min(self.most * self.page, slots)
        rows = self.inner.keys.nbytes + self.inner.values.nbytes
        return rows * read // slots + self.extremes.nbytes + self.inner.slots.nbytes

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


def _extremes(keys: Float[Array, "B G P page D"], slots: Int[Array, "B G P page"]) -> Float[Array, "B G P E"]:
    """Elementwise minimum and maximum of the keys present, one behind the other."""
    present = (slots >= 0)[..., None]
    low = jnp.min(jnp.where(present, keys, jnp.inf), axis=3)
    return jnp.concatenate([low, jnp.max(jnp.where(present, keys, -jnp.inf), axis=3)], axis=-1)
