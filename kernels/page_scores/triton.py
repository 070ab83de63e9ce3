"""Page scores on a GPU: a program a block of pages, whose bounds are read once for all queries of their KV head."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kvx.kernels.checks import dtype_refusal, triton_refusal
from kvx.kernels.page_scores.rows import empty_as_lowest, split_by_sign

MOST_QUERIES = 128
"""Queries of a KV head that a program holds in registers."""


@dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        block: pages a program.
        warps, stages: Triton's.
        interpret: run in Pallas' interpreter, on any platform.
    """

    block: int = 32
    warps: int = 4
    stages: int = 1
    interpret: bool = False


CANDIDATES = tuple(Tuning(block=block, warps=warps) for block in (16, 32, 64, 128) for warps in (2, 4, 8))
"""What a benchmark tries."""


def refusal(queries: Float[Array, "B G R T D"], bounds: Float[Array, "B G P E"]) -> str | None:
    """Why this implementation cannot take these arguments."""
    if reason := triton_refusal():
        return reason
    dim, many = queries.shape[-1], queries.shape[2] * queries.shape[3]
    if dim < 8 or dim & (dim - 1):
        return f"D is {dim}, allowed are powers of two from 8 up"
    if many > MOST_QUERIES:
        return f"a KV head has {many} queries, allowed are at most {MOST_QUERIES}"
    return dtype_refusal({"queries": queries.dtype, "bounds": bounds.dtype})


def scores(
    queries: Float[Array, "B G R T D"], bounds: Float[Array, "B G P E"], group: str, tuning: Tuning = Tuning()
) -> Float[Array, "B G P"]:
    """-inf for an empty page."""
    from jax.experimental.pallas import triton as plgpu

    batch, heads, pages, width = bounds.shape
    rows = split_by_sign(queries).reshape(batch * heads, -1, width)
    found = pl.pallas_call(
        partial(_scores, group=group, block=tuning.block),
        grid=(batch * heads, pl.cdiv(pages, tuning.block)),
        out_shape=jax.ShapeDtypeStruct((batch * heads, pages), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages),
        interpret=tuning.interpret,
        name="page_scores",
    )(rows, bounds.reshape(batch * heads, pages, width))
    return found.reshape(batch, heads, pages)


def _scores(rows_ref: Any, bounds_ref: Any, out_ref: Any, *, group: str, block: int) -> None:
    from jax.experimental.pallas import triton as plgpu

    one, many, pages = pl.program_id(0), rows_ref.shape[1], bounds_ref.shape[1]
    tile = max(16, pl.next_power_of_2(many))
    here = pl.ds(pl.program_id(1) * block, block)
    inside = pl.program_id(1) * block + jnp.arange(block) < pages
    mine = jnp.arange(tile) < many
    dtype = jnp.promote_types(rows_ref.dtype, bounds_ref.dtype)
    # A dynamic start, since a static slice past the end is refused.
    rows = plgpu.load(rows_ref.at[one, pl.ds(pl.program_id(0) * 0, tile), :], mask=mine[:, None], other=0.0)
    bounds = plgpu.load(bounds_ref.at[one, here, :], mask=inside[:, None], other=0.0)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    products = lax.dot_general(
        rows.astype(dtype),
        bounds.astype(dtype),
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    products = empty_as_lowest(products)
    if group == "max":
        found = jnp.max(jnp.where(mine[:, None], products, -jnp.inf), axis=0)
    else:
        found = jnp.sum(jnp.where(mine[:, None], products, 0.0), axis=0) / many
    plgpu.store(out_ref.at[one, here], found, mask=inside)
