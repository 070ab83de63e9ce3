"""The first pass on a TPU: output and log-sum-exp, skipping the blocks of keys that are out of reach.

The grid's last axis walks the blocks of keys in reach of a block of queries; what is beyond its end fetches nothing.
The query heads of a KV head follow each other, so that their log-sum-exps leave as one block, rows of a (heads, T)
array as main memory holds it: written head by head they would be copied into that layout.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvx.kernels.logits import tile_mask
from kvx.kernels.prefill_attention.mosaic_tpu_tiles import (
    FLOOR,
    column_of,
    is_turned,
    product,
    runs_of,
    tile_logits,
    turn,
    turn_back,
)  # fmt: skip


def _kernel(runs, query, key, value, positions, spots, *rest, scale, window, softcap, dim: int, width: int):
    parts: Any = rest if len(rest) == 7 else (None, None, *rest)
    labels, others, out, lse, mixed, top, total = parts
    batch, kv_head, block, head, step = (pl.program_id(axis) for axis in range(5))
    place = (batch * pl.num_programs(1) + kv_head) * pl.num_programs(2) + block
    start, full, stop, end = runs_of(runs, place)
    here = start + step

    @pl.when(step == 0)
    def _():
        mixed[...] = jnp.zeros_like(mixed)
        top[...] = jnp.full_like(top, FLOOR)
        total[...] = jnp.zeros_like(total)

    def meet(masked: bool):
        logits = tile_logits(key[...], query[...], turned=is_turned(dim), scale=scale, softcap=softcap)
        if masked:
            pair = None if labels is None else (labels[...], column_of(others[...]))
            logits = jnp.where(tile_mask(positions[...], column_of(spots[...]), window, pair), logits, -jnp.inf)
        higher = jnp.maximum(top[...], jnp.max(logits, axis=0, keepdims=True))
        shrink = jnp.exp(top[...] - higher)
        weights = jnp.exp(logits - higher)
        total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        more = product(value[...], weights.astype(value.dtype), (1 if is_turned(width) else 0, 0))
        mixed[...] = mixed[...] * shrink + more
        top[...] = higher

    inside = (here >= full) & (here < stop)
    pl.when((here < end) & inside)(lambda: meet(False))
    pl.when((here < end) & jnp.logical_not(inside))(lambda: meet(True))

    @pl.when(step == pl.num_programs(4) - 1)
    def _():
        some = total[...] > 0
        divisor = jnp.where(some, total[...], 1.0)
        found = mixed[...] / divisor
        out[...] = found if is_turned(width) else found.T
        lse[pl.ds(head, 1), :] = jnp.where(some, top[...] + jnp.log(divisor), -jnp.inf)


def forward(
    runs: Int[Array, "B G Q 4"],
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G S D"],
    values: Float[Array, "B G S V"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G S"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    blocks: tuple[int, int],
) -> tuple[Float[Array, "B G R T V"], Float[Array, "B G R T"]]:
    """Float32 output and natural log-sum-exp; T and S are multiples of the (query, key) blocks."""
    batch, kv_heads, group, length, dim = queries.shape
    total, width = values.shape[2:]
    query_block, key_block = blocks
    counts = length // query_block, total // key_block

    def there(b, g, i, j, runs):
        """The block of keys of this step; beyond the last one, the last one, which is there already."""
        start, _, _, end = runs_of(runs, (b * kv_heads + g) * counts[0] + i)
        return jnp.maximum(jnp.minimum(start + j, end - 1), 0)

    def of_query(channels):
        if is_turned(channels):
            return pl.BlockSpec((None, None, None, channels, query_block), lambda b, g, i, r, j, runs: (b, g, r, 0, i))
        return pl.BlockSpec((None, None, None, query_block, channels), lambda b, g, i, r, j, runs: (b, g, r, i, 0))

    def of_keys(channels):
        if is_turned(channels):
            return pl.BlockSpec(
                (None, None, channels, key_block), lambda b, g, i, r, j, runs: (b, g, 0, there(b, g, i, j, runs))
            )
        return pl.BlockSpec(
            (None, None, key_block, channels), lambda b, g, i, r, j, runs: (b, g, there(b, g, i, j, runs), 0)
        )

    row = pl.BlockSpec((None, 1, query_block), lambda b, g, i, r, j, runs: (b, 0, i))
    specs = [
        of_query(dim),
        of_keys(dim),
        of_keys(width),
        row,
        pl.BlockSpec((None, None, 1, key_block), lambda b, g, i, r, j, runs: (b, g, 0, there(b, g, i, j, runs))),
    ]
    operands = [turn(queries), turn(keys), turn(values), query_positions[:, None], key_positions[:, :, None]]
    if segments is not None:
        specs += [row, pl.BlockSpec((None, 1, key_block), lambda b, g, i, r, j, runs: (b, 0, there(b, g, i, j, runs)))]
        operands += [labels[:, None] for labels in segments]
    shape = (width, length) if is_turned(width) else (length, width)
    out, lse = pl.pallas_call(
        partial(_kernel, scale=scale, window=window, softcap=softcap, dim=dim, width=width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, counts[0], group, counts[1]),
            in_specs=specs,
            out_specs=[
                of_query(width),
                pl.BlockSpec((None, None, group, query_block), lambda b, g, i, r, j, runs: (b, g, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((width, query_block), jnp.float32),
                pltpu.VMEM((1, query_block), jnp.float32),
                pltpu.VMEM((1, query_block), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, group, *shape), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, group, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        name="prefill_attention_forward",
    )(runs.reshape(-1), *operands)
    return turn_back(out, width), lse
