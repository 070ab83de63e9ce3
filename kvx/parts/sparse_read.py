"""The stage that keeps everything and reads little: pages ranked by a bound for each query (grid 4)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvx.context import Context
from kvx.evidence import Evidence
from kvx.parts.amounts import Amount
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.paged import Paged
from kvx.tokens import Tokens


@pytree
class SparseRead(Stage):
    """Read at most `amount` slots per KV head and step, in whole pages, the newest token's page included."""

    amount: Amount = static()
    page: int = static(16)
    group: str = static("max")
    skip: tuple[int, ...] = static((0, 1))
    stores = True

    def at(self, layer: int, layers: int) -> "SparseRead | None":
        return None if layer in {index % layers for index in self.skip} else self

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Paged:
        spec = context.spec
        budget = jnp.maximum(self.amount.of(context.lengths, spec.prompt) // self.page, 1)
        return Paged.pack(
            tokens,
            mask,
            capacity,
            page=self.page,
            budget=budget,
            most=max(self.amount.most(spec.prompt) // self.page, 1),
            group=self.group,
        )
