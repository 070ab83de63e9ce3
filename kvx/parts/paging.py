"""The stage that stores what is kept in pages, which forks of a cache share."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvx.context import Context
from kvx.evidence import Evidence
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.pages import Pages, pages_for
from kvx.tokens import Tokens


@pytree
class Paging(Stage):
    """Single-head pages of `page` slots: as many as a head's tokens and what will come need."""

    page: int = static(16)
    stores = True
    append_only = True
    measures = True
    undoes = 2**31 - 1

    def need(self, tokens: Tokens, mask: Bool[Array, "B G T"], state: None, context: Context) -> Int[Array, ""]:
        """Slots a head on average, since heads share one pool."""
        pages = pages_for(jnp.sum(mask, axis=-1), self.page, context.spec.room)
        return (jnp.sum(pages) * self.page + pages.size - 1) // pages.size

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Pages:
        spec = context.spec
        pages = mask.shape[0] * mask.shape[1] * -(-capacity // self.page)
        return Pages.pack(tokens, mask, pages, page=self.page, longest=spec.prompt, room=spec.room)
