"""Uniform codes: quantize groups asymmetrically, pack codes little-end into 32-bit words, and back.

One layout for stores and kernels: code i of a group sits at bit i * bits of the group's little-end bit string, in
32-bit words; 3-bit codes come as 32 codes in 3 words. Scale and minimum are 16-bit (bfloat16, which a TPU reads
natively), and codes are chosen against the rounded scale and minimum, so that their rounding costs no accuracy twice.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, UInt8, UInt32

BITS = (2, 3, 4, 8)
"""Widths that pack."""

ROUNDING = 2.0**-8
"""One unit in the last place of a bfloat16, relative: rounding to nearest after this shift rounds up."""


def quantize(
    x: Float[Array, "*batch n"], bits: int
) -> tuple[UInt8[Array, "*batch n"], BFloat16[Array, "*batch"], BFloat16[Array, "*batch"]]:
    """Codes of groups laid along the last axis: c = round((x - m) / s), s = (max - min) / (2^bits - 1).

    Returns:
        codes, scale s, minimum m; the error is at most s / 2 everywhere. A group of zeros has s = 1.
    """
    x = x.astype(jnp.float32)
    low, high = jnp.min(x, axis=-1), jnp.max(x, axis=-1)
    # The minimum is rounded down and the scale up, so that no element falls outside the codes: |error| <= s / 2.
    minimum = _as_stored(low - jnp.abs(low) * ROUNDING)
    spread = high - minimum
    scale = _as_stored(jnp.where(spread > 0, spread * (1 + ROUNDING) / (2**bits - 1), 1.0))
    steps = (x - minimum[..., None]) / scale[..., None]
    codes = jnp.clip(jnp.round(steps), 0, 2**bits - 1).astype(jnp.uint8)
    return codes, scale.astype(jnp.bfloat16), minimum.astype(jnp.bfloat16)


def _as_stored(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """float32 rounded to bfloat16's 8 bits; XLA on a GPU drops the two casts that would say the same."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def dequantize(
    codes: UInt8[Array, "*batch n"], scale: Float[Array, "*batch"], minimum: Float[Array, "*batch"]
) -> Float[Array, "*batch n"]:
    """c * s + m in float32."""
    wide = codes.astype(jnp.float32)
    return wide * scale.astype(jnp.float32)[..., None] + minimum.astype(jnp.float32)[..., None]


def quantize_residual(
    x: Float[Array, "*batch n"],
    codes: UInt8[Array, "*batch n"],
    scale: Float[Array, "*batch"],
    minimum: Float[Array, "*batch"],
    bits: int,
) -> UInt8[Array, "*batch n"]:
    """What `quantize` left, in as many bits again: l = round((x - c s - m) / (s / 2^bits)), offset by 2^(bits - 1).

    Both together are one code of twice the width, (2^bits c + l) (s / 2^bits) + m with l from -2^(bits - 1). The error
    is at most s / 2^(bits + 1), except where the rest is within that of +s / 2, which has no code: up to s / 2^bits.
    """
    half = 2 ** (bits - 1)
    left = x.astype(jnp.float32) - dequantize(codes, scale, minimum)
    steps = jnp.round(left * 2**bits / scale.astype(jnp.float32)[..., None])
    return (jnp.clip(steps, -half, half - 1) + half).astype(jnp.uint8)


def words(count: int, bits: int) -> int:
    """32-bit words that `count` codes fill; `count * bits` is a multiple of 32."""
    assert count * bits % 32 == 0, "checked when a policy is built"
    return count * bits // 32


def pack(codes: UInt8[Array, "*batch n"], bits: int) -> UInt32[Array, "*batch w"]:
    """Codes along the last axis as little-end words."""
    count = codes.shape[-1]
    if bits == 3:
        # 32 codes are 96 bits: spread each code's bits over the three words it may straddle.
        threes = codes.reshape(*codes.shape[:-1], count // 32, 32).astype(jnp.uint32)
        planes = jnp.stack([(threes >> bit) & 1 for bit in range(3)], axis=-1).reshape(*threes.shape[:-1], 3, 32)
        packed = jnp.sum(planes << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
        return packed.reshape(*codes.shape[:-1], words(count, bits))
    per_word = 32 // bits
    grouped = codes.reshape(*codes.shape[:-1], count // per_word, per_word).astype(jnp.uint32)
    return jnp.sum(grouped << (bits * jnp.arange(per_word, dtype=jnp.uint32)), axis=-1, dtype=jnp.uint32)


def unpack(packed: UInt32[Array, "*batch w"], bits: int) -> UInt8[Array, "*batch n"]:
    """The codes of `pack`."""
    if bits == 3:
        three = packed.reshape(*packed.shape[:-1], packed.shape[-1] // 3, 3)
        planes = (three[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        planes = planes.reshape(*three.shape[:-1], 32, 3).astype(jnp.uint8)
        codes = planes[..., 0] | (planes[..., 1] << 1) | (planes[..., 2] << 2)
        return codes.reshape(*packed.shape[:-1], packed.shape[-1] * 32 // 3)
    shifts = bits * jnp.arange(32 // bits, dtype=jnp.uint32)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * (32 // bits)).astype(jnp.uint8)
