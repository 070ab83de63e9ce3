"""The Walsh-Hadamard transform along the head dimension: an orthogonal mixing of channels that is its own inverse."""

from functools import partial
from importlib import import_module
from typing import Any

from jaxtyping import Array, Float

from kvx.kernels.checks import dtype_refusal
from kvx.kernels.implementations import KERNELS, choose
from kvx.kernels.over_mesh import KV_HEADS, ROWS, over_mesh

NAMES = ("reference", "xla", "mosaic_tpu", "triton")
"""Implementations: one file each, loaded when it is first asked for."""


def hadamard(
    x: Float[Array, "*batch N M"],
    *,
    axis: int = -1,
    implementation: str | None = None,
    tuning: Any = None,
) -> Float[Array, "*batch N M"]:
    """y_i = D^(-1/2) sum_j (-1)^popcount(i & j) x_j over the D channels of an axis.

    Sylvester's order, normalised: y has x's length, and transforming twice gives x back. Applied to queries and keys
    after their rotation it changes no logit, and spreads an outlier channel over all (QuaRot, Ashkboos et al. 2024).

    Args:
        x: float32 or bfloat16; products are summed in float32.
        axis: where the channels are: -1, or -2 for caches with slots last. A TPU pads 64 channels along -1 to 128 lanes
            and takes them nevertheless: new tokens are transformed once, while a cache is read at every step.
        implementation: "reference", "xla", "mosaic_tpu", "triton", or None, which picks by platform.
        tuning: block sizes of the named implementation (its `Tuning`); None: its own.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: channels that are no power of two, another axis, or what the named implementation cannot take.
    """
    if axis not in (-1, -2):
        raise ValueError(f"axis is {axis}, allowed: -1 or -2")
    channels = x.shape[axis]
    if channels & (channels - 1) or channels == 0:
        raise ValueError(f"x has {channels} channels, allowed: powers of two")

    def refusal(name: str) -> str | None:
        if name not in KERNELS:
            return None
        if not 16 <= channels <= 256:
            return f"x has {channels} channels, it takes 16 to 256"
        return dtype_refusal({"x": x.dtype}) or _module(name).refusal(x, tuning)

    offered = {name: partial(_run, name) for name in NAMES}
    return choose("hadamard", implementation, offered, refusal)(x, axis=axis, tuning=tuning)


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def _run(name: str, x: Float[Array, "*batch N M"], **options: Any) -> Float[Array, "*batch N M"]:
    transform = partial(_module(name).hadamard, **options)
    leading = (ROWS + KV_HEADS)[: x.ndim - 2]
    return over_mesh(transform, [leading], leading)(x) if name in KERNELS else transform(x)
