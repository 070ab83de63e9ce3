"""The stage that reads contexts apart: all start where the prefix ends, and see it and themselves."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from kvx.context import Context, Layout
from kvx.errors import BadInput
from kvx.evidence import Evidence, Requests
from kvx.inputs import traced
from kvx.kernels.logits import SHARED
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.dense import Dense
from kvx.stores.tempered import CONTEXT, Tempered
from kvx.tokens import Tokens


@pytree
class SharePositions(Stage):
    """Tokens of label 0 are the prefix, at 0 to P - 1; each further label is a context, at P to P + c - 1.

    What follows the prompt goes on at P + max c, and sees everything. A prompt without labels is all prefix. Nothing
    can be chained with it, since other stages tell recent tokens by their positions.

    Attributes:
        temperature, scale: how contexts are attended (`kvx.stores.tempered`).
    """

    temperature: float = static()
    scale: float = static()
    stores = True
    unchained = True

    def observe(self, prefill: bool) -> Requests:
        return Requests(marks=frozenset({"label"}))

    def layout(self, labels: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Layout:
        """By the labels.

        Raises:
            BadInput: labels that fall within a row, so that the prefix would not come first, or a context be split.
        """
        index = jnp.arange(labels.shape[1], dtype=jnp.int32)
        present = index < lengths[:, None]
        _check_order(labels, present)
        prefix = jnp.sum(present & (labels == 0), axis=1, keepdims=True, dtype=jnp.int32)
        begins = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
        positions = index - start + jnp.where(labels > 0, prefix, 0)
        return Layout(jnp.where(present, positions, -1), jnp.where(labels > 0, labels, SHARED))

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        return {CONTEXT: tokens.stats["label"] > 0}

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Tempered:
        dense = Dense.pack(tokens.with_form(rotated=True), mask, capacity)
        return Tempered(dense, self.temperature, self.scale)


def _check_order(labels: Int[Array, "B T"], present: Bool[Array, "B T"]) -> None:
    if traced(labels, present):
        return
    for row, (own, real) in enumerate(zip(np.asarray(labels), np.asarray(present), strict=True)):
        falls = np.flatnonzero(np.diff(own[real]) < 0)
        if falls.size:
            raise BadInput(
                f"labels fall from {own[falls[0]]} to {own[falls[0] + 1]} in row {row}; allowed: 0 for the prefix, "
                "then each context's own, rising"
            )
