"""A second tier of one slot a head: the mean of all that came there (RazorAttention's compensation token)."""

from typing import ClassVar

from jaxtyping import Array, Bool

from kvx.context import Context
from kvx.evidence import Evidence
from kvx.parts.demote import Lower
from kvx.pytree import pytree
from kvx.stores.mean_token import MeanSlot
from kvx.tokens import Tokens


@pytree
class MeanToken(Lower):
    """What leaves the first tier is averaged into one token that counts as many times as tokens are in it."""

    constant: ClassVar[bool] = True

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> MeanSlot:
        return MeanSlot.pack(tokens, mask)
