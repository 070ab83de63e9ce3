"""What the TPU kernels of prefill attention share: tiles of logits (keys by queries), and turned operands.

A head dim below the 128 lanes is kept with tokens last, (D, tokens): the other way round each row would be padded to
the lanes in main memory, and XLA would make that copy at every call.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.implementations import LANES
from kvx.kernels.logits import capped

FLOOR = -1e30
"""Below every logit, and finite: the difference of two of them is 0, where that of two infinities is nan."""


def is_turned(width: int) -> bool:
    """Whether operands of so many channels are kept with tokens last."""
    return width % LANES != 0


def turn(array: Float[Array, "*batch N D"]) -> Float[Array, "*batch X Y"]:
    """As the kernels take it."""
    return jnp.swapaxes(array, -1, -2) if is_turned(array.shape[-1]) else array


def turn_back(array: Float[Array, "*batch X Y"], channels: int) -> Float[Array, "*batch N D"]:
    """Tokens first again."""
    return jnp.swapaxes(array, -1, -2) if is_turned(channels) else array


def runs_of(table: Any, place: Array) -> tuple[Array, Array, Array, Array]:
    """(first, first full, end of full, end) of one block; the table is flat, as scalar memory wants it."""
    return table[4 * place], table[4 * place + 1], table[4 * place + 2], table[4 * place + 3]


def tile_logits(
    key: Float[Array, "*key"], query: Float[Array, "*query"], *, turned: bool, scale: float, softcap: float | None
) -> Float[Array, "keys queries"]:
    """softcap(scale * k . q), float32."""
    return capped(scale * product(key, query, (0, 0) if turned else (1, 1)), softcap)


def product(first: Array, second: Array, contracted: tuple[int, int]) -> Float[Array, "M N"]:
    """Float32 operands at full precision, 16-bit ones in one pass."""
    precision = jax.lax.Precision.HIGHEST if first.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(first, second, dimensions, precision=precision, preferred_element_type=jnp.float32)


def column_of(row: Int[Array, "1 N"]) -> Int[Array, "N 1"]:
    """A row as a column: lanes turn into sublanes in whole registers only."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]
