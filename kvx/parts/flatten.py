"""The stage that stores heads of different lengths in one flat run."""

from jaxtyping import Array, Bool

from kvx.evidence import Evidence
from kvx.parts.budgets import Compete
from kvx.policy import Context, Stage, round_up
from kvx.pytree import pytree, static
from kvx.stores.flat import Flat
from kvx.tokens import Tokens


@pytree
class Flatten(Stage):
    """A flat run for what a layer's heads keep together, and a rectangular tail for what comes."""

    split: Compete = static()
    stores = True
    append_only = True

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Flat:
        return Flat.pack(tokens, mask, round_up(self.split.total(context.spec)), round_up(context.spec.room))
