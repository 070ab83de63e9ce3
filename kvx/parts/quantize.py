"""The stage that stores what is kept in few bits (grid 2): uniform codes by group, behind an exact tail."""

from jaxtyping import Array, Bool

from kvx.buckets import round_up
from kvx.context import Context, Spec
from kvx.errors import BadInput
from kvx.evidence import Evidence
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.dense import Dense
from kvx.stores.packed import Packed
from kvx.tokens import Tokens


@pytree
class Quantize(Stage):
    """Keys by channel x n tokens, values by token x n channels; keys flushed in blocks of R, values one by one.

    Attributes:
        bits: width of the codes; None: no codes, the full-precision cache.
        group: n.
        residual: R, the newest tokens, which stay exact; a multiple of n.
    """

    bits: int | None = static()
    group: int = static(32)
    residual: int = static(128)
    stores = True

    @property
    def values_apart(self) -> bool:  # type: ignore[override]
        return self.bits is not None

    def capacity(self, spec: Spec, layer: int) -> None:
        """No limit; refuses head dims that do not divide into groups and words.

        Raises:
            BadInput: `group` does not divide the head dim, or a token's codes do not fill whole 32-bit words.
        """
        if self.bits is None:
            return
        for what, width in (("keys", spec.attention.key_dim), ("values", spec.attention.value_dim)):
            if width % self.group:
                raise BadInput(
                    f"group={self.group} does not divide the head dim {width} of the model's {what}; allowed: a "
                    "divisor of it"
                )
            if width * self.bits % 32:
                raise BadInput(
                    f"bits={self.bits} does not fill whole 32-bit words at the head dim {width} of the model's {what}; "
                    "allowed: widths whose product with it is a multiple of 32"
                )

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Packed | Dense:
        if self.bits is None:
            return Dense.pack(tokens, mask, capacity)
        # Under a selection that acts at every step a head may hold its budget and a group not yet in excess, two groups
        # that are protected or coded in part only, and the ring, which cannot leave.
        more = self.residual + 2 * self.group if context.evicting else 0
        slots = round_up(max(capacity + more, self.residual), self.group)
        return Packed.pack(
            tokens, mask, capacity, slots=slots, bits=self.bits, group=self.group, residual=self.residual
        )
