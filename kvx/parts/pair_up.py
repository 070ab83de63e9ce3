"""The stage that stores neighbouring layers in pairs, each pair as shared directions (grid 3, scope: layers)."""

from dataclasses import replace

from jaxtyping import Array, Bool

from kvx.context import Context
from kvx.evidence import Evidence
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.directions import Blend
from kvx.stores.pair import LOWER, UPPER, Half, Pair, Waiting
from kvx.tokens import Tokens


@pytree
class PairUp(Stage):
    """Layers n and n + 1, n + 2 and n + 3, ... share their storage, n = floor(start * layers).

    A last layer without a neighbour keeps its own, as all below n do. During a prompt one layer's whole keys and
    values wait for the next layer's, and go when that is packed.

    Attributes:
        blend: how a pair merges.
        start: share of the layers below which none is paired.
        layer: which of its pair a layer is; set by `at`.
    """

    blend: Blend = static()
    start: float = static(0.5)
    layer: int = static(LOWER)
    stores = True
    values_apart = True
    aligned = True

    def at(self, layer: int, layers: int) -> "PairUp | None":
        first = int(self.start * layers + 1e-9)
        place = layer - first
        alone = place % 2 == 0 and layer + 1 == layers
        return None if place < 0 or alone else replace(self, layer=UPPER if place % 2 else LOWER)

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Waiting | Half:
        if self.layer == LOWER:
            return Waiting(tokens)
        # Only one layer waits at a time, and nothing else of this policy is open.
        (waiting,) = context.storage
        return Half(Pair.pack(waiting.tokens, tokens, mask, capacity, self.blend), UPPER)
