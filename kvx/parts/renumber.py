"""The stage that stores what is kept unrotated, at positions by place in the cache."""

from jaxtyping import Array, Bool

from kvx.context import Context
from kvx.evidence import Evidence
from kvx.pytree import pytree
from kvx.stage import Stage
from kvx.stores.renumbered import Renumbered
from kvx.tokens import Tokens


@pytree
class Renumber(Stage):
    """Positions renumbered inside the cache."""

    rotated = False
    renumber = True
    stores = True

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Renumbered:
        return Renumbered.pack(tokens, mask, capacity)
