"""What the Triton kernels of prefill attention share: a tile's logits, and the sweep over blocks in reach.

Logits are in base 2 (times log2 e), since the GPU's exponential is. Lengths are multiples of the blocks, so that no
load needs a mask; what padding may see is said by positions alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

LOG2E = math.log2(math.e)
FLOOR = -1e30
"""Below every logit, and finite: the difference of two of them is 0, where that of two infinities is nan."""

Carry = TypeVar("Carry")


@dataclass(frozen=True)
class Logits:
    """softcap(scale * q . k) in base 2."""

    scale: float
    softcap: float | None

    def of(self, first: Float[Array, "M D"], second: Float[Array, "N D"]) -> Float[Array, "M N"]:
        """Of every row of the first operand with every row of the second."""
        return self.scaled(dot(first, second, trans_b=True))

    def scaled(self, scores: Float[Array, "M N"]) -> Float[Array, "M N"]:
        """Of plain products."""
        if self.softcap is None:
            return scores * (self.scale * LOG2E)
        return jnp.tanh(scores * (self.scale / self.softcap)) * (self.softcap * LOG2E)

    def slope(self, logits: Float[Array, "M N"]) -> Float[Array, "M N"] | float:
        """The derivative of the natural logits by q . k."""
        if self.softcap is None:
            return self.scale
        bent = logits * (1 / (self.softcap * LOG2E))
        return self.scale * (1 - bent * bent)


def dot(first: Float[Array, "M K"], second: Float[Array, "X Y"], *, trans_b: bool = False) -> Float[Array, "M N"]:
    """On tensor cores for 16-bit operands; float32 operands at full precision, never TF32."""
    precision = jax.lax.Precision.HIGHEST if first.dtype == jnp.float32 else None
    dimensions = (((1,), (1 if trans_b else 0,)), ((), ()))
    return jax.lax.dot_general(first, second, dimensions, precision=precision, preferred_element_type=jnp.float32)


def sweep(runs: Any, body: Callable[[Array, Carry, bool], Carry], start: Carry) -> Carry:
    """`body(block, carry, masked)` over the blocks in reach; the run in which all is visible needs no mask."""
    first, full, stop, end = (runs[index] for index in np.arange(4, dtype=np.int32))
    carry = jax.lax.fori_loop(first, full, lambda block, carry: body(block, carry, True), start)
    carry = jax.lax.fori_loop(full, stop, lambda block, carry: body(block, carry, False), carry)
    return jax.lax.fori_loop(stop, end, lambda block, carry: body(block, carry, True), carry)


def rows_of(block: Array, size: int) -> Any:
    """The slice of a block; its start is a multiple of its size, which lets loads be wide."""
    return pl.ds(pl.multiple_of(block * size, size), size)
