"""Blocks of queries for the XLA forms: how many tokens each, and the static causal groups that share a reach."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

BLOCK = 128
GROUPS = 8
# A block's logits are B * H * BLOCK * S floats; larger batches take smaller blocks so that this stays bounded.
BLOCK_ROWS = 4 * 9 * 128


@dataclass(frozen=True)
class QueryBlocks:
    """T queries behind `past` earlier keys, in blocks of `size`."""

    size: int
    length: int
    past: int

    @classmethod
    def of(cls, queries: tuple[int, ...], keys: int) -> "QueryBlocks":
        """For queries of shape (B, G, R, T, D) and so many keys."""
        batch, kv_heads, group, length, _ = queries
        size = BLOCK
        while size > 16 and batch * kv_heads * group * size > BLOCK_ROWS:
            size //= 2
        return cls(min(size, max(length, 1)), length, keys - length)

    @property
    def count(self) -> int:
        """Blocks, the last one padded."""
        return -(-self.length // self.size)

    def stack(self, array: Array, axis: int, fill: Any = 0) -> Array:
        """(blocks, ..., size, ...): the loop's leading axis, from the axis of the queries, padded with `fill`."""
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, self.count * self.size - self.length)
        padded = jnp.pad(array, widths, constant_values=fill)
        shape = (*array.shape[:axis], self.count, self.size, *array.shape[axis + 1 :])
        return jnp.moveaxis(padded.reshape(shape), axis, 0)

    def join(self, pieces: list[Array]) -> Array:
        """(B, G, R, T, ...) of the stacked blocks of all groups in order."""
        whole = jnp.moveaxis(jnp.concatenate(pieces), 0, 3)
        shape = (*whole.shape[:3], self.count * self.size, *whole.shape[5:])
        return whole.reshape(shape)[:, :, :, : self.length]

    def groups(self) -> list[tuple[int, int, int]]:
        """(first block, last block, keys in reach) of up to GROUPS runs of blocks."""
        # Two blocks at least: XLA unrolls a loop of one turn, and unrolled blocks are alive together, a whole S x S.
        count = max(min(GROUPS, self.count // 2), 1)
        edges = [self.count * index // count for index in range(count + 1)]
        total = self.past + self.length
        return [(first, last, min(self.past + last * self.size, total)) for first, last in pairwise(edges)]
