"""A batch of text: rows of packed documents, as every pipeline yields them and every loss reads them."""

from typing import Any

import jax
from jaxtyping import Bool, Integer

from kvx.pytree import pytree, static


@pytree
class Batch:
    """Rows of tokens, perhaps cut into parts; arrays of numpy or of JAX.

    Attributes:
        tokens: ids.
        segments: the document of each token, counted from 1 in every row; 0 is padding.
        positions: within the document.
        mask: tokens that are to be learned.
        packed: False: every row is one document without padding, which attention need not look up.
    """

    tokens: Integer[Any, "*parts B T"]
    segments: Integer[Any, "*parts B T"]
    positions: Integer[Any, "*parts B T"]
    mask: Bool[Any, "*parts B T"]
    packed: bool = static(True)

    def part(self, share: int, shares: int) -> "Batch":
        """One process's rows of a whole batch, which its number of rows divides."""
        rows = len(self.tokens) // shares
        return jax.tree.map(lambda array: array[share * rows : (share + 1) * rows], self)


@pytree
class Pairs:
    """Answers to the same prompts, of which one is preferred; the mask covers the answers alone."""

    chosen: Batch
    rejected: Batch
