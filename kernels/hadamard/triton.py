"""The Walsh-Hadamard transform on a GPU: tiles times the +-1 matrix on tensor cores, several tiles a program."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from kvx.kernels.checks import triton_refusal
from kvx.kernels.hadamard.reference import signs


@dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        block: vectors a step, a power of two from 16.
        steps: steps of a program, which share its copy of the matrix.
        warps, stages: of Triton.
        interpret: run without a GPU, for tests.
    """

    block: int = 64
    steps: int = 8
    warps: int = 4
    stages: int = 2
    interpret: bool = False


CANDIDATES = tuple(
    Tuning(block, steps, warps, stages)
    for block, warps in ((32, 4), (64, 4), (64, 8), (128, 8))
    for steps in (4, 16)
    for stages in (2, 3)
)


def refusal(x: Float[Array, "*batch N M"], tuning: Any) -> str | None:
    """Why these arguments cannot run."""
    if tuning is not None and not isinstance(tuning, Tuning):
        return f"tuning is {tuning}, it takes its own Tuning"
    if reason := triton_refusal(interpreted=tuning is not None and tuning.interpret):
        return reason
    if tuning is not None and (tuning.block < 16 or tuning.block & (tuning.block - 1)):
        return f"tuning has a block of {tuning.block}, it takes powers of two from 16"
    return None


def hadamard(x: Float[Array, "*batch N M"], *, axis: int, tuning: Tuning | None = None) -> Float[Array, "*batch N M"]:
    """See `kvx.kernels.hadamard.hadamard`."""
    tuning, channels = tuning or Tuning(), x.shape[axis]
    flat = x.reshape(1, -1, channels) if axis == -1 else x.reshape(-1, *x.shape[-2:])
    length = flat.shape[1 if axis == -1 else 2]
    out = pl.pallas_call(
        partial(_kernel, length=length, block=tuning.block, steps=tuning.steps, rows_last=axis == -2),
        grid=(pl.cdiv(length, tuning.block * tuning.steps), flat.shape[0]),
        out_shape=jax.ShapeDtypeStruct(flat.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages),
        interpret=tuning.interpret,
        name="hadamard",
    )(jnp.asarray(signs(channels), x.dtype), flat)
    return out.reshape(x.shape)


def _kernel(signs_ref, x_ref, out_ref, *, length, block, steps, rows_last):
    matrix, channels = signs_ref[...], signs_ref.shape[0]
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    row, first, index = pl.program_id(1), pl.program_id(0) * steps * block, jnp.arange(channels)

    def step(turn, carry):
        slots = first + turn * block + jnp.arange(block)
        if rows_last:
            where, kept = (row, index[:, None], slots[None, :]), (slots < length)[None, :]
        else:
            where, kept = (row, slots[:, None], index[None, :]), (slots < length)[:, None]
        tile = plgpu.load(x_ref.at[where], mask=kept, other=0)
        pair = (matrix, tile) if rows_last else (tile, matrix)
        product = jnp.dot(*pair, precision=precision, preferred_element_type=jnp.float32)
        plgpu.store(out_ref.at[where], (product * channels**-0.5).astype(out_ref.dtype), mask=kept)
        return carry

    jax.lax.fori_loop(0, steps, step, 0)
