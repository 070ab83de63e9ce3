"""Page scores on a TPU: a step a block of pages, whose bounds are read once for all queries of their KV head.

The heads of a row follow each other, so that their scores leave as one block of (heads, pages), as memory holds them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kvx.kernels.checks import dtype_refusal
from kvx.kernels.page_scores.rows import empty_as_lowest, split_by_sign


@dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        block: pages a step.
    """

    block: int = 1024


def refusal(queries: Float[Array, "B G R T D"], bounds: Float[Array, "B G P E"]) -> str | None:
    """Why this implementation cannot take these arguments."""
    if bounds.shape[-1] % 128:
        return f"bounds have {bounds.shape[-1]} channels, allowed are multiples of 128"
    return dtype_refusal({"queries": queries.dtype, "bounds": bounds.dtype})


def scores(
    queries: Float[Array, "B G R T D"], bounds: Float[Array, "B G P E"], group: str, tuning: Tuning = Tuning()
) -> Float[Array, "B G P"]:
    """-inf for an empty page."""
    batch, heads, pages, width = bounds.shape
    rows = split_by_sign(queries).reshape(batch, heads, -1, width)
    block = min(tuning.block, pages)
    return pl.pallas_call(
        partial(_scores, group=group),
        grid=(batch, pl.cdiv(pages, block), heads),
        in_specs=[
            pl.BlockSpec((None, None, rows.shape[2], width), lambda row, _, head: (row, head, 0, 0)),
            pl.BlockSpec((None, None, block, width), lambda row, step, head: (row, head, step, 0)),
        ],
        out_specs=pl.BlockSpec((None, heads, block), lambda row, step, _: (row, 0, step)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, pages), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="page_scores",
    )(rows, bounds)


def _scores(rows_ref: Any, bounds_ref: Any, out_ref: Any, *, group: str) -> None:
    dtype = jnp.promote_types(rows_ref.dtype, bounds_ref.dtype)
    exact = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    products = lax.dot_general(
        rows_ref[...].astype(dtype),
        bounds_ref[...].astype(dtype),
        (((1,), (1,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    reduce = jnp.max if group == "max" else jnp.mean
    out_ref[pl.ds(pl.program_id(2), 1), :] = reduce(empty_as_lowest(products), axis=0, keepdims=True)
