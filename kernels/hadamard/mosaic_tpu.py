"""The Walsh-Hadamard transform on a TPU: one product with the +-1 matrix, which the matrix unit does in passing."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kvx.kernels.hadamard.reference import signs


@dataclass(frozen=True)
class Tuning:
    """Bytes of x a step."""

    tile_bytes: int = 2**20


CANDIDATES = tuple(Tuning(size) for size in (2**19, 2**20, 2**21))


def refusal(x: Float[Array, "*batch N M"], tuning: Any) -> str | None:
    """Why these arguments cannot run."""
    return None if tuning is None or isinstance(tuning, Tuning) else f"tuning is {tuning}, it takes its own Tuning"


def hadamard(x: Float[Array, "*batch N M"], *, axis: int, tuning: Tuning | None = None) -> Float[Array, "*batch N M"]:
    """See `kvx.kernels.hadamard.hadamard`."""
    channels = x.shape[axis]
    unit, tile_bytes = (16 if axis == -1 else 128), (tuning or Tuning()).tile_bytes
    # With channels last, everything else is one long run of rows; with slots last, the leading axes are.
    flat = x.reshape(1, -1, channels) if axis == -1 else x.reshape(-1, *x.shape[-2:])
    length = flat.shape[1 if axis == -1 else 2]
    block = max(tile_bytes // (channels * x.dtype.itemsize) // unit, 1) * unit
    block = min(block, length)
    shape = (None, block, channels) if axis == -1 else (None, channels, block)
    spec = pl.BlockSpec(shape, (lambda b, j: (b, j, 0)) if axis == -1 else (lambda b, j: (b, 0, j)))
    out = pl.pallas_call(
        partial(_kernel, rows_last=axis == -2),
        grid=(flat.shape[0], pl.cdiv(length, block)),
        in_specs=[pl.BlockSpec((channels, channels), lambda b, j: (0, 0)), spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(flat.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="hadamard",
    )(jnp.asarray(signs(channels), x.dtype), flat)
    return out.reshape(x.shape)


def _kernel(signs_ref, x_ref, out_ref, *, rows_last):
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    pair = (signs_ref[...], x_ref[...]) if rows_last else (x_ref[...], signs_ref[...])
    product = jnp.dot(*pair, precision=precision, preferred_element_type=jnp.float32)
    out_ref[...] = (product * signs_ref.shape[0] ** -0.5).astype(out_ref.dtype)
