"""Quantize and pack, plainly: every code by its formula, and its bits put one by one where the layout says."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt32

from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes, joined_ranges
from kvx.kernels.quantize_pack.uniform_codes import dequantize, quantize


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
    by_channel = rows if slots_last else jnp.swapaxes(rows, -1, -2)
    batch, heads, channels, slots = by_channel.shape
    if along == "channels":
        groups = by_channel.reshape(batch, heads, channels // group, group, slots)
        codes, scale, minimum = quantize(jnp.moveaxis(groups, 3, -1), bits)
        flat = jnp.moveaxis(codes, -1, 3).reshape(by_channel.shape)
        return TokenCodes(_words(flat, bits), joined_ranges(scale, minimum), bits)
    codes, scale, minimum = quantize(by_channel.reshape(batch, heads, channels, slots // group, group), bits)
    ranges = jnp.swapaxes(joined_ranges(scale, minimum), -1, -2)
    return ChannelCodes(_words(codes.reshape(by_channel.shape), bits), ranges, bits)


def unpack_dequantize(
    codes: ChannelCodes | TokenCodes, *, dtype: jnp.dtype, slots_last: bool, tuning: Any = None
) -> Float[Array, "B G m n"]:
    """See `kvx.kernels.quantize_pack.unpack_dequantize`."""
    by_channel = _codes(codes.words, codes.bits)
    batch, heads, channels, slots = by_channel.shape
    if isinstance(codes, TokenCodes):
        groups = jnp.moveaxis(by_channel.reshape(batch, heads, -1, codes.group, slots), 3, -1)
        rows = jnp.moveaxis(dequantize(groups, codes.scale, codes.minimum), -1, 3)
    else:
        groups = by_channel.reshape(batch, heads, channels, -1, codes.group)
        rows = dequantize(groups, jnp.swapaxes(codes.scale, -1, -2), jnp.swapaxes(codes.minimum, -1, -2))
    rows = rows.reshape(by_channel.shape).astype(dtype)
    return rows if slots_last else jnp.swapaxes(rows, -1, -2)


def _words(codes: UInt8[Array, "B G D P"], bits: int) -> UInt32[Array, "B G w P"]:
    """Bit b of channel i's code is bit i bits + b of the slot's bit string."""
    string = jnp.stack([(codes >> bit) & 1 for bit in range(bits)], axis=3)
    string = string.reshape(*codes.shape[:2], -1, 32, codes.shape[-1]).astype(jnp.uint32)
    return jnp.sum(string << jnp.arange(32, dtype=jnp.uint32)[:, None], axis=3, dtype=jnp.uint32)


def _codes(words: UInt32[Array, "B G w P"], bits: int) -> UInt8[Array, "B G D P"]:
    string = (words[:, :, :, None] >> jnp.arange(32, dtype=jnp.uint32)[:, None]) & 1
    string = string.reshape(*words.shape[:2], -1, bits, words.shape[-1]).astype(jnp.uint8)
    return jnp.sum(string << jnp.arange(bits, dtype=jnp.uint8)[:, None], axis=3, dtype=jnp.uint8)
