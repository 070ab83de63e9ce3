"""A budget that grows with the text: a buffer of at least so many tokens, or a share of what there is."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.context import Context, Spec
from kvx.evidence import Evidence
from kvx.parts.budgets import Budget
from kvx.pytree import pytree, static


@pytree
class Growing(Budget):
    """sinks + max(least, n // ratio) slots at n tokens so far (RazorAttention, Tang et al. 2024, section 3.3).

    Attributes:
        sinks: first tokens, protected, beside the buffer.
        least: tokens in the buffer, however short the text.
        ratio: text to buffer; None: the buffer never grows.
    """

    sinks: int = static()
    least: int = static()
    ratio: int | None = static(None)

    @property
    def grows(self) -> bool:  # type: ignore[override]
        return self.ratio is not None

    def capacity(self, spec: Spec, layer: int) -> int:
        longest = spec.prompt + spec.room
        return self.sinks + max(self.least, 0 if self.ratio is None else longest // self.ratio)

    def counts(self, scores: Float[Array, "B G T"], mask: Bool[Array, "B G T"], context: Context) -> Int[Array, "B G"]:
        return jnp.broadcast_to(self._at(context.lengths)[:, None], mask.shape[:2])

    def grown(self, counts: Int[Array, "B G"], evidence: Evidence) -> Int[Array, "B G"]:
        return jnp.broadcast_to(self._at(evidence.seen)[:, None], counts.shape)

    def _at(self, seen: Int[Array, "B"]) -> Int[Array, "B"]:
        buffer = jnp.full_like(seen, self.least)
        return self.sinks + (buffer if self.ratio is None else jnp.maximum(buffer, seen // self.ratio))
