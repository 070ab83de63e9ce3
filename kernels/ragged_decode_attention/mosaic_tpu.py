"""Attention over listed rows on a TPU: what it takes, and how a call is cut into lists, a step each, and blocks.

Lists in even number come in halves, for chips of two cores; the steps of a half follow each other, since each begins
the copies of the next.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvx.kernels.checks import dtype_refusal
from kvx.kernels.implementations import LANES
from kvx.kernels.merge_partials import Partial
from kvx.kernels.ragged_decode_attention.mosaic_tpu_kernel import kernel
from kvx.kernels.ragged_decode_attention.mosaic_tpu_positions import Positions
from kvx.kernels.ragged_decode_attention.reads import Reads

MOST_QUERIES = 1024
"""Queries of a list: their logits of a block are held in the scratch memory that a kernel has by default."""


@dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        block: slots computed at a time; whole pages.
    """

    block: int = 512


def refusal(reads: Reads) -> str | None:
    """Why this implementation cannot take these arguments."""
    if reason := dtype_refusal({"queries": reads.queries.dtype, "keys": reads.keys.dtype}):
        return reason
    widths = (reads.keys.shape[1],) if reads.values is None else (reads.keys.shape[1], reads.values.shape[1])
    for width in widths:
        if width % LANES:
            return (
                f"a row has {width} channels, allowed are multiples of {LANES}; narrower keys and values go side by "
                "side in one row, with values=None"
            )
    tile = _sublanes(reads)
    if reads.table is None and (reads.keys.shape[0] % tile or reads.keys.shape[0] < tile):
        return f"there are {reads.keys.shape[0]} rows, allowed are multiples of {tile}"
    if reads.table is not None and reads.page % tile:
        return f"a page has {reads.page} slots, allowed are multiples of {tile}"
    if reads.table is not None and reads.key_positions is not None and LANES % reads.page and reads.page % LANES:
        return f"a page has {reads.page} slots, with positions allowed are divisors and multiples of {LANES}"
    if reads.queries.shape[1] > MOST_QUERIES:
        return f"a KV head has {reads.queries.shape[1]} queries, allowed are at most {MOST_QUERIES}"
    return None


def attend(reads: Reads, scale: float, window: int | None, softcap: float | None, tuning: Tuning = Tuning()) -> Partial:
    """out (L, M, V) and lse (L, M)."""
    lists, many, dim = reads.queries.shape
    width, joined = reads.keys.shape[1], reads.values is None
    block = _block(reads, tuning)
    queries = jnp.pad(reads.queries, ((0, 0), (0, 0), (0, width - dim))) if joined else reads.queries
    queries = queries.astype(jnp.promote_types(queries.dtype, reads.keys.dtype))
    halves = 2 if lists % 2 == 0 else 1
    per_half = lists // halves
    starts = jnp.zeros_like(reads.lengths) if reads.starts is None else reads.starts
    value_width = width if joined else reads.value_dim

    def this(half: Any, step: Any, *_: Any) -> tuple[Any, int, int]:
        return half * per_half + step, 0, 0

    def following(half: Any, step: Any, *_: Any) -> tuple[Any, int, int]:
        return jnp.minimum(half * per_half + step + 1, lists - 1), 0, 0

    def listed(array: Array, index: Any = this, space: Any = pltpu.VMEM) -> tuple[Array, pl.BlockSpec]:
        return array, pl.BlockSpec((None, *array.shape[1:]), index, memory_space=space)

    operands: dict[str, tuple[Array, pl.BlockSpec]] = {"queries": listed(queries)}
    if reads.table is not None:
        table = reads.table[:, None]
        operands["table"] = listed(table, this, pltpu.SMEM)
        operands["next_table"] = listed(table, following, pltpu.SMEM)
    in_place = pl.BlockSpec(memory_space=pltpu.HBM)
    for name, array in (("keys", reads.keys), ("values", reads.values)):
        if array is not None:
            shape = (-1, reads.page, array.shape[1]) if reads.table is not None else array.shape
            operands[name] = (array.reshape(shape), in_place)
    buffers = [
        pltpu.VMEM((2, block // reads.page, reads.page, array.shape[1]), array.dtype)
        if reads.table is not None
        else pltpu.VMEM((2, block, array.shape[1]), array.dtype)
        for array in (reads.keys, reads.values)
        if array is not None
    ]
    positions = None
    if reads.key_positions is not None and reads.query_positions is not None:
        positions = Positions.of(reads, block)
        operands["query_positions"] = listed(reads.query_positions[..., None])
        operands["key_positions"] = (positions.held(reads.key_positions), in_place)
        buffers.append(positions.buffers)
    body = partial(
        kernel,
        names=tuple(operands),
        per_half=per_half,
        page=reads.page,
        rows=reads.keys.shape[0],
        block=block,
        tile=_sublanes(reads),
        positions=positions,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    out, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(halves, per_half),
            in_specs=[spec for _, spec in operands.values()],
            out_specs=(
                pl.BlockSpec((None, many, value_width), this),
                pl.BlockSpec((None, many, 1), this),
            ),
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32)],
        ),
        out_shape=(
            jax.ShapeDtypeStruct((lists, many, value_width), jnp.float32),
            jax.ShapeDtypeStruct((lists, many, 1), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="ragged_decode_attention",
    )(reads.lengths, starts, *(array for array, _ in operands.values()))
    return Partial(out[..., value_width - reads.value_dim :], lse[..., 0])


def _sublanes(reads: Reads) -> int:
    """Rows of a tile of memory: copies start and end at its edges."""
    return 8 * 4 // reads.keys.dtype.itemsize


def _block(reads: Reads, tuning: Tuning) -> int:
    """Slots computed at a time: whole pages, or no more rows than there are."""
    if reads.table is not None:
        return max(min(tuning.block, -(-reads.longest // reads.page) * reads.page) // reads.page, 1) * reads.page
    tile = _sublanes(reads)
    return min(tuning.block, -(-(reads.longest + tile) // tile) * tile, reads.keys.shape[0])
