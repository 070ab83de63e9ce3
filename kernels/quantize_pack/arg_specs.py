"""Shapes of quantizing and packing, and back: small ones of every width, and caches of heads of 64, 128 and 256.

Tolerances: codes are compared as words, of which a share may differ: a division that is rounded otherwise flips a code
that lay on the edge between two, at odds of about 2^-20 a code. Rows are computed in float32 from the same words; in
bfloat16 they are rounded once, by up to 2^-9 of themselves, on either side of an edge.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kvx.kernels.arg_spec import ArgSpec
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes, joined_ranges

FLIPPED, EXACT, ROUNDED = 1e-3, 1e-6, 8e-3


def _rows(key: jax.Array, *, shape: tuple[int, ...], dtype: Any, slots_last: bool) -> dict[str, Any]:
    batch, heads, slots, channels = shape
    return {"rows": jax.random.normal(key, (batch, heads, channels, slots) if slots_last else shape, dtype)}


def _codes(key: jax.Array, *, shape: tuple[int, ...], bits: int, group: int, along: str) -> dict[str, Any]:
    (batch, heads, slots, channels), keys = shape, jax.random.split(key)
    words = jax.random.bits(keys[0], (batch, heads, channels * bits // 32, slots), jnp.uint32)
    kind = ChannelCodes if along == "slots" else TokenCodes
    grouped = (slots // group, channels) if along == "slots" else (channels // group, slots)
    scale, minimum = jax.random.uniform(keys[1], (2, batch, heads, *grouped), minval=0.5, maxval=1.0)
    ranges = joined_ranges((scale * 2.0**-bits).astype(jnp.bfloat16), (-minimum).astype(jnp.bfloat16))
    return {"codes": kind(words, ranges, bits)}


def _pair(
    name: str, *shape: int, bits: int, group: int, along: str, dtype: Any = jnp.bfloat16, slots_last: bool = False
) -> tuple[ArgSpec, ArgSpec]:
    """Both ways for one cache."""
    size = "x".join(map(str, shape))
    label = " ".join((name, size, f"{bits} bits, {group} {along}", *(["slots last"] if slots_last else [])))
    there = partial(_rows, shape=shape, dtype=dtype, slots_last=slots_last)
    back = partial(_codes, shape=shape, bits=bits, group=group, along=along)
    coded = {"bits": bits, "group": group, "along": along, "slots_last": slots_last}
    rows = {"dtype": dtype, "slots_last": slots_last}
    rounding = EXACT if dtype == jnp.float32 else ROUNDED
    return (
        ArgSpec(label, there, coded, FLIPPED, function="quantize_pack"),
        ArgSpec(label, back, rows, rounding, function="unpack_dequantize"),
    )


def _both(*args: Any, **options: Any) -> tuple[ArgSpec, ...]:
    """Groups either way."""
    return (*_pair(*args, along="channels", **options), *_pair(*args, along="slots", **options))


NUMERIC = (
    *_both("small", 2, 3, 256, 64, bits=2, group=32, dtype=jnp.float32),
    *_both("small", 1, 2, 256, 64, bits=3, group=32, dtype=jnp.float32, slots_last=True),
    *_both("small", 1, 2, 192, 128, bits=4, group=64),
    *_both("small", 1, 2, 128, 64, bits=8, group=64, slots_last=True),
    *_both("small", 1, 1, 512, 64, bits=2, group=32, slots_last=True),
    *_both("small", 1, 2, 128, 64, bits=4, group=64, slots_last=True),
    *_both("small", 1, 1, 256, 256, bits=2, group=64),
    *_both("small", 1, 2, 128, 128, bits=8, group=128),
    *_pair("many groups", 1, 1, 4608, 64, bits=2, group=32, along="slots", slots_last=True),
    *_pair("many groups", 1, 1, 1160, 64, bits=8, group=8, along="slots", dtype=jnp.float32),
    *_pair("ragged", 1, 1, 150, 128, bits=4, group=128, along="channels", dtype=jnp.float32),
)

SIZES = tuple((batch, slots) for batch in (1, 8, 64) for slots in (4096, 32768))

# 3 bits of 128 channels are 12 words a slot, no whole tile of a TPU: there XLA packs them.
AOT = (
    *(
        spec
        for bits, group in ((2, 32), (2, 64), (4, 64), (8, 128))
        for batch, slots in SIZES
        for spec in _both(f"llama-3-8b b{batch} {slots}", batch, 8, slots, 128, bits=bits, group=group)
    ),
    *(
        spec
        for bits, group in ((2, 32), (4, 64), (8, 64))
        for name, kv_heads, dim in (("llama-3.2-1b", 8, 64), ("gemma-3-4b", 4, 256))
        for spec in _both(f"{name} b8 32768", 8, kv_heads, 32768, dim, bits=bits, group=group, slots_last=dim < 128)
    ),
)
"""Heads of 64 have their slots last, as on a TPU they must."""

CI = _both("llama-3-8b b8 4096", 8, 8, 4096, 128, bits=4, group=64)
