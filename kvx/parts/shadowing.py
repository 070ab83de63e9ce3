"""The stage that keeps a prompt's keys as factors and its values on the host, and fetches chunks for each query."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvx.context import Context, Spec
from kvx.errors import BadInput
from kvx.evidence import Evidence
from kvx.parts.amounts import Amount
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stage import Stage
from kvx.stores.dense import Dense
from kvx.stores.shadow import Shadow
from kvx.tokens import Tokens


@pytree
class Shadowing(Stage):
    """Factored keys, values on the host, exact outliers and a local rest.

    Attributes:
        amount: tokens of chosen chunks that are read per KV head and step.
        rank: of the factors.
        chunk: tokens a chunk.
        outliers: chunks a head keeps exactly.
        local: the last whole chunks, exact too, as is the part of one after them.
    """

    amount: Amount = static()
    rank: int = static(160)
    chunk: int = static(8)
    outliers: int = static(48)
    local: int = static(4)
    rotated = False
    stores = True
    values_apart = True
    append_only = True

    def capacity(self, spec: Spec, layer: int) -> None:
        """No limit; refuses a rank that factors cannot have.

        Raises:
            BadInput: more than the keys of all KV heads have channels.
        """
        attention = spec.attention
        channels = attention.kv_heads * attention.key_dim
        if self.rank > channels:
            raise BadInput(
                f"rank={self.rank} is more than the {channels} key channels of the model's {attention.kv_heads} KV "
                f"heads; allowed: 1 to {channels}"
            )

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Shadow | Dense:
        spec = context.spec
        prompt = min(spec.prompt, capacity - spec.room)
        most = max(self.amount.most(spec.prompt) // self.chunk, 1)
        if prompt // self.chunk - self.local - self.outliers <= most:
            # No row is long enough for a chunk to be left out: nothing to factor or to move.
            return Dense.pack(tokens.with_form(rotated=True), mask, capacity)
        return Shadow.pack(
            tokens,
            mask,
            prompt,
            spec.room,
            chunk=self.chunk,
            rank=self.rank,
            outliers=self.outliers,
            local=self.local,
            budget=jnp.maximum(self.amount.of(context.lengths, spec.prompt) // self.chunk, 1),
            most=most,
        )

    def before(self, store: Shadow | Dense, state: None, query: Query, context: Context) -> tuple[Shadow | Dense, None]:
        return (store.fetch(query) if isinstance(store, Shadow) else store), state
