"""The stage that stores heads of different lengths in one flat run."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvx.buckets import LANE, round_up
from kvx.context import Context
from kvx.evidence import Evidence
from kvx.parts.budgets import Compete
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.dense import Dense
from kvx.stores.flat import Flat
from kvx.stores.layout import layout_for, slots_by_rows
from kvx.stores.tiers import Tiers
from kvx.tokens import Tokens


@pytree
class Flatten(Stage):
    """A flat run for what a layer's heads keep together, and a rectangular tail for what comes."""

    split: Compete = static()
    stores = True
    append_only = True

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Tiers:
        tokens = tokens.with_form(rotated=True)
        total = slots_by_rows(self.split.total(context.spec), LANE)
        nothing, room = jnp.zeros_like(mask), round_up(context.spec.room)
        tail = Dense.pack(tokens, nothing, room, layout=layout_for(tokens))
        return Tiers((tail, Flat.pack(tokens, mask, total, closed=True)))
