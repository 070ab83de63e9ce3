"""The stage that reads sparsely by what layers below found: exact top slots, reused up the layers (grid 4)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvx.context import Context
from kvx.decoder import AttentionSpec
from kvx.errors import BadInput
from kvx.evidence import Evidence
from kvx.kernels.merge_partials import Partial
from kvx.parts.amounts import Amount
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stage import Stage
from kvx.stores.chosen import Chosen
from kvx.stores.dense import Dense
from kvx.tokens import Tokens


@pytree
class Reuse(Stage):
    """A few layers read everything and choose; each layer above them reads what the last of them chose.

    Layers below the first that chooses stay as they are.

    Attributes:
        amount: slots of a choice, per query head or, with `group`, per KV head.
        depths: where layers choose, as a share of the depth; read if `layers` is None.
        layers: which layers choose; negative ones count from the top.
        recent: newest tokens that every choice holds, the query's own included.
        group: how the query heads of a KV head share a choice: "max" or "mean"; None: each has its own.
        sparse: whether this layer reads what was chosen below; set by `at`.
    """

    amount: Amount = static()
    depths: tuple[float, ...] = static()
    layers: tuple[int, ...] | None = static(None)
    recent: int = static(1)
    group: str | None = static(None)
    sparse: bool = static(False)
    stores = True
    aligned = True

    def at(self, layer: int, layers: int) -> "Reuse | None":
        choosing = self.choosing(layers)
        return None if layer < min(choosing) else replace(self, sparse=layer not in choosing)

    def objection(self, layers: Mapping[int, AttentionSpec]) -> str | None:
        if len({(each.kv_heads, each.heads) for each in layers.values()}) > 1:
            return "reuses choices of heads up the layers, but their heads differ; allowed: models of layers alike"
        return None

    def choosing(self, layers: int) -> set[int]:
        """The layers that choose, in a model of so many.

        Raises:
            BadInput: a layer that the model does not have.
        """
        if self.layers is None:
            return {int(depth * layers + 0.5) for depth in self.depths}
        for layer in self.layers:
            if not -layers <= layer < layers:
                raise BadInput(f"layers={self.layers} names layer {layer}; allowed: {-layers} to {layers - 1}")
        return {layer % layers for layer in self.layers}

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Chosen:
        spec = context.spec
        return Chosen(
            Dense.pack(tokens.with_form(rotated=True), mask, capacity),
            jnp.maximum(self.amount.of(context.lengths, spec.prompt), self.recent),
            most=min(max(self.amount.most(spec.prompt), self.recent), capacity),
            recent=self.recent,
            sets=1 if self.group else spec.attention.group,
            group=self.group,
            sparse=self.sparse,
        )

    def read(self, store: Chosen, query: Query, carry: Any, context: Context) -> tuple[Partial, Any]:
        return (store.read_at(query, carry), carry) if self.sparse else store.choose(query)
