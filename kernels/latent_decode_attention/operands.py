"""Rows of latent attention whose latent part is low-bit codes, and what both kinds of rows stand for."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvx.kernels.pytree import pytree
from kvx.kernels.quantize_pack.coded import TokenCodes


@pytree
class CodedRows:
    """Rows [rotary ; latent]: the rotary key as it is, the latent as codes.

    Rotary keys are not coded: a rotation spreads their rounding over both channels of a pair, and they are few (as in
    FlashMLA's 8-bit layout, DeepSeek 2025).

    Attributes:
        rotary: P channels, (B, C, P), or (B, P, C) with slots last.
        codes: of the V latent channels, as one KV head's; their slots are always last.
    """

    rotary: Float[Array, "B m n"]
    codes: TokenCodes

    @property
    def channels(self) -> int:
        """V, the latent channels."""
        return self.codes.words.shape[-2] * 32 // self.codes.bits


Rows = Float[Array, "B m n"] | CodedRows
"""Whose last axis slots are is told beside them."""


def width(rows: Rows, slots_last: bool) -> int:
    """Channels of a row, rotary and latent."""
    axis = 1 if slots_last else 2
    return rows.rotary.shape[axis] + rows.channels if isinstance(rows, CodedRows) else rows.shape[axis]


def capacity(rows: Rows, slots_last: bool) -> int:
    """Slots C."""
    return (rows.rotary if isinstance(rows, CodedRows) else rows).shape[2 if slots_last else 1]


def dtypes(queries: Float[Array, "B T H D"], rows: Rows) -> dict[str, jnp.dtype]:
    """Of what a kernel multiplies, by name."""
    return {"queries": queries.dtype, "rows": (rows.rotary if isinstance(rows, CodedRows) else rows).dtype}


def slots_first(rows: Rows, slots_last: bool) -> Float[Array, "B C D"]:
    """What the rows stand for, decoded if they are codes (float32 then), a slot to a row."""
    if not isinstance(rows, CodedRows):
        return jnp.swapaxes(rows, 1, 2) if slots_last else rows
    rotary = slots_first(rows.rotary, slots_last)
    latent = jnp.swapaxes(rows.codes.decode()[:, 0], 1, 2)
    return jnp.concatenate([rotary.astype(jnp.float32), latent], axis=-1)
