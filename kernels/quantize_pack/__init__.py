"""Uniform codes of groups in 32-bit words: quantize and pack in one pass, unpack and dequantize in one pass.

One layout for stores and kernels: little-end codes in words with slots last (`coded`), chosen as in `uniform_codes`.
The fused forms hold no array of single codes in main memory.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kvx.kernels.checks import check_shape, dtype_refusal
from kvx.kernels.implementations import KERNELS, choose
from kvx.kernels.over_mesh import KV_HEADS, ROWS, over_mesh
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes
from kvx.kernels.quantize_pack.uniform_codes import (
    BITS,
    dequantize,
    pack,
    quantize,
    quantize_residual,
    unpack,
    words,
)

__all__ = [
    "BITS",
    "dequantize",
    "pack",
    "quantize",
    "quantize_pack",
    "quantize_residual",
    "unpack",
    "unpack_dequantize",
    "words",
]

NAMES = ("reference", "xla", "mosaic_tpu", "triton")
"""Implementations: one file each, loaded when it is first asked for."""


def quantize_pack(
    rows: Float[Array, "B G P D"] | Float[Array, "B G D P"],
    *,
    bits: int,
    group: int,
    along: str,
    slots_last: bool = False,
    implementation: str | None = None,
    tuning: Any = None,
) -> ChannelCodes | TokenCodes:
    """Codes c = round((x - m) / s) of groups of n numbers, s = (max - min) / (2^bits - 1), with their s and m.

    KIVI's keys share a range along slots, its values along channels (Liu et al. 2024, section 3).

    Args:
        rows: P slots of D channels, float32 or bfloat16.
        bits: 2, 3, 4 or 8.
        group: n, a divisor of D (along channels) or of P (along slots).
        along: the axis that groups run along.
        slots_last: whether rows are (B, G, D, P). A TPU pads 64 channels as the last axis to 128 lanes and takes them
            nevertheless: rows are coded once, while `decode_attention`, which refuses them, reads them at every step.
        implementation: "reference", "xla", "mosaic_tpu", "triton", or None, which picks by platform.
        tuning: block sizes of the named implementation (its `Tuning`); None: its own.

    Returns:
        `TokenCodes` of groups along channels, `ChannelCodes` of groups along slots.

    Raises:
        ValueError: bits, group or along out of range, or what the named implementation cannot take.
    """
    check_shape("rows", rows, (None,) * 4)
    channels, slots = rows.shape[-2:] if slots_last else rows.shape[:-3:-1]
    _check(channels, slots, bits, group, along)
    run = choose(
        "quantize_pack",
        implementation,
        {name: _split(name, "quantize_pack") for name in NAMES},
        lambda name: _refusal(name, {"rows": rows.dtype}, channels, slots, bits, group, along, tuning),
    )
    return run(rows, bits=bits, group=group, along=along, slots_last=slots_last, tuning=tuning)


def unpack_dequantize(
    codes: ChannelCodes | TokenCodes,
    *,
    dtype: DTypeLike = jnp.float32,
    slots_last: bool = False,
    implementation: str | None = None,
    tuning: Any = None,
) -> Float[Array, "B G P D"] | Float[Array, "B G D P"]:
    """Rows c s + m, computed in float32: within half a step of what `quantize_pack` was given.

    Args:
        codes: not nested.
        dtype: of the rows.
        slots_last: whether they are to be (B, G, D, P).
        implementation, tuning: as for `quantize_pack`.

    Raises:
        ValueError: nested codes, or what the named implementation cannot take.
    """
    if codes.lower is not None:
        raise ValueError("codes have lower codes, allowed: None, since nested codes are decoded by their own method")
    along = _along(codes)
    _check(codes.width, codes.slots, codes.bits, codes.group, along)
    run = choose(
        "unpack_dequantize",
        implementation,
        {name: _split(name, "unpack_dequantize") for name in NAMES},
        lambda name: _refusal(
            name, {"what is decoded": dtype}, codes.width, codes.slots, codes.bits, codes.group, along, tuning
        ),
    )
    return run(codes, dtype=jnp.dtype(dtype), slots_last=slots_last, tuning=tuning)


def _split(implementation: str, function: str) -> Callable[..., Any]:
    """An implementation's function, split over a mesh if it is a kernel."""
    run = partial(_run, implementation, function)
    if implementation not in KERNELS:
        return run
    both = ROWS + KV_HEADS
    return lambda array, **options: over_mesh(partial(run, **options), [both], both)(array)


def _refusal(implementation: str, dtypes: Mapping[str, DTypeLike], *facts: Any) -> str | None:
    """Why it cannot take these facts of its arguments; None if it can."""
    reason = dtype_refusal(dtypes) if implementation in KERNELS else None
    return reason or _run(implementation, "refusal", *facts)


def _run(implementation: str, function: str, *args: Any, **options: Any) -> Any:
    return getattr(import_module(f"{__name__}.{implementation}"), function)(*args, **options)


def _along(codes: ChannelCodes | TokenCodes) -> Literal["channels", "slots"]:
    return "slots" if isinstance(codes, ChannelCodes) else "channels"


def _check(channels: int, slots: int, bits: int, group: int, along: str) -> None:
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, allowed: {BITS}")
    if along not in ("channels", "slots"):
        raise ValueError(f"along is {along!r}, allowed: 'channels', 'slots'")
    size = channels if along == "channels" else slots
    if group < 1 or size % group:
        raise ValueError(f"group is {group}, allowed: divisors of the {size} {along}")
    if channels * bits % 32:
        raise ValueError(f"rows have {channels} channels, allowed at {bits} bits: counts whose codes fill 32-bit words")
