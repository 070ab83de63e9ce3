"""Quantize and pack in plain XLA: the classes' own encoding and decoding, whole words at a time."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes


def refusal(channels: int, slots: int, bits: int, group: int, along: str, tuning: Any) -> None:
    """It takes everything that the public function does."""


def quantize_pack(
    rows: Float[Array, "B G m n"],
    *,
    bits: int,
    group: int,
    along: Literal["channels", "slots"],
    slots_last: bool,
    tuning: Any = None,
) -> ChannelCodes | TokenCodes:
    """See `kvx.kernels.quantize_pack.quantize_pack`."""
    kind = ChannelCodes if along == "slots" else TokenCodes
    return kind.encode(jnp.swapaxes(rows, -1, -2) if slots_last else rows, bits, group)


def unpack_dequantize(
    codes: ChannelCodes | TokenCodes, *, dtype: jnp.dtype, slots_last: bool, tuning: Any = None
) -> Float[Array, "B G m n"]:
    """See `kvx.kernels.quantize_pack.unpack_dequantize`."""
    rows = codes.decode().astype(dtype)
    return rows if slots_last else jnp.swapaxes(rows, -1, -2)
