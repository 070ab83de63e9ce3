"""The stage that stores what is kept as nested codes: one cache, of which a draft reads half the bits."""

from typing import Any

from jaxtyping import Array, Bool

from kvx.context import Context, Spec
from kvx.errors import BadInput
from kvx.evidence import Evidence
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.dense import Dense
from kvx.stores.nested import Nested
from kvx.tokens import Tokens


@pytree
class Nest(Stage):
    """Keys by channel x n tokens, values by token x n channels (all of them, if there are fewer), in b + b bits.

    Attributes:
        bits: width b of either code; None: no codes, the full-precision cache.
        group: n.
        gamma: drafts that may be verified at once; at most n - 1.
    """

    bits: int | None = static()
    group: int = static(128)
    gamma: int = static(5)
    stores = True
    append_only = True
    narrows = True

    @property
    def undoes(self) -> int:  # type: ignore[override]
        return self.gamma + 1

    @property
    def acts(self) -> bool:  # type: ignore[override]
        return False

    @property
    def values_apart(self) -> bool:  # type: ignore[override]
        return self.bits is not None

    def capacity(self, spec: Spec, layer: int) -> None:
        """No limit; refuses head dims that do not divide into groups and words.

        Raises:
            BadInput: `group` does not divide the width of values, or a token's codes do not fill whole 32-bit words.
        """
        if self.bits is None:
            return
        width = spec.attention.value_dim
        if width % min(self.group, width):
            raise BadInput(
                f"group={self.group} does not divide the head dim {width} of the model's values; allowed: a divisor of "
                "it, or more than it"
            )
        for what, width in (("keys", spec.attention.key_dim), ("values", spec.attention.value_dim)):
            if width * self.bits % 32:
                raise BadInput(
                    f"bits={self.bits} does not fill whole 32-bit words at the head dim {width} of the model's {what}; "
                    "allowed: widths whose product with it is a multiple of 32"
                )

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Nested | Dense:
        if self.bits is None:
            return Dense.pack(tokens, mask, capacity)
        return Nested.pack(tokens, mask, capacity, bits=self.bits, group=self.group, drafts=self.gamma)

    def settle(self, store: Any) -> Any:
        return store if self.bits is None else store.settle()
