"""The second pass on a TPU: column statistics by the saved log-sum-exp, a block of keys against all queries in reach.

Running statistics are tiles of (keys, 128): what a lane holds is reduced over lanes once, at the end.
"""

from collections.abc import Sequence
from functools import partial
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvx.kernels.logits import tile_mask
from kvx.kernels.prefill_attention.columns import Column
from kvx.kernels.prefill_attention.mosaic_tpu_tiles import (
    LANES,
    column_of,
    is_turned,
    runs_of,
    tile_logits,
    turn,
)  # fmt: skip


def _kernel(
    runs, widths, key, query, lse, positions, spots, *rest, columns: tuple[Column, ...], scale, window,
    softcap, dim: int, segmented: bool, voting: bool,
):  # fmt: skip
    rest = list(rest)
    labels: Any = rest.pop(0) if segmented else None
    others: Any = rest.pop(0) if segmented else None
    votes: Any = rest.pop(0) if voting else None
    outs, found = rest[: len(columns)], rest[len(columns) :]
    batch, kv_head, block, part, step = (pl.program_id(axis) for axis in range(5))
    place = (batch * pl.num_programs(1) + kv_head) * pl.num_programs(2) + block
    heads = query.shape[0]
    start, full, stop, end = runs_of(runs, place)
    here = start + step

    @pl.when(step == 0)
    def _():
        for array in found:
            array[...] = jnp.zeros_like(array)

    def counted(each: int):
        """The log-sum-exp of a block of queries; a query that saw nothing (-inf) weighs nothing."""
        row = lse[pl.ds(part * heads + each, 1), :]
        return jnp.where(row == -jnp.inf, jnp.inf, row)

    def meet(masked: bool):
        given: Any = None
        for each in range(heads):
            logits = tile_logits(key[...], query[each], turned=is_turned(dim), scale=scale, softcap=softcap)
            weights = jnp.exp(logits - counted(each))
            given = weights if given is None else given + weights
        if heads > 1:
            given = given / heads
        spot = column_of(spots[...])
        if masked:
            pair = None if others is None else (labels[...], column_of(others[...]))
            given = jnp.where(tile_mask(positions[...], spot, window, pair), given, 0.0)
        for place, (column, so_far) in enumerate(zip(columns, found, strict=True)):
            mapped = given
            if column.near < inf:
                distance = positions[...] - spot
                mapped = jnp.where(distance < widths[batch * len(columns) + place], mapped, 0.0)
            if column.power == 2:
                mapped = mapped * mapped
            if column.last < inf:
                mapped = mapped * votes[place : place + 1, :]
            more = so_far[...]
            for lane in range(0, mapped.shape[1], LANES):
                more = column.combine(more, mapped[:, lane : lane + LANES])
            so_far[...] = more

    inside = (here >= full) & (here < stop)
    pl.when((here < end) & inside)(lambda: meet(False))
    pl.when((here < end) & jnp.logical_not(inside))(lambda: meet(True))

    @pl.when(step == pl.num_programs(4) - 1)
    def _():
        for column, out, array in zip(columns, outs, found, strict=True):
            # Turned first: reducing over sublanes leaves a row, as main memory wants it.
            out[pl.ds(part, 1), :] = column.reduced(array[...].T, axis=0)[None]


def statistics(
    runs: Int[Array, "B G K 4"],
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G S D"],
    lse: Float[Array, "B G R T"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G S"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    votes: Float[Array, "B N T"] | None,
    widths: Int[Array, "B N"] | None,
    *,
    columns: Sequence[Column],
    scale: float,
    window: int | None,
    softcap: float | None,
    blocks: tuple[int, int],
) -> list[Float[Array, "B G R S"]]:
    """Statistics of columns that are all pooled, or none of them.

    Args:
        lse: natural; a row of -inf counts nowhere.
        votes, widths: of each column, what queries count for and how near is near; None if no column asks.
    """
    batch, kv_heads, group, length, dim = queries.shape
    total = keys.shape[2]
    query_block, key_block = blocks
    # A pooled statistic needs all query heads of a KV head at once; any other is a program for each.
    heads, parts = (group, 1) if columns[0].pooled else (1, group)
    counts = total // key_block, length // query_block
    flat_widths = jnp.zeros((1,), jnp.int32) if widths is None else widths.reshape(-1)

    def there(b, g, i, j, runs):
        """The block of queries of this step; beyond the last one, the last one, which is there already."""
        start, _, _, end = runs_of(runs, (b * kv_heads + g) * counts[0] + i)
        return jnp.maximum(jnp.minimum(start + j, end - 1), 0)

    def at(shape, where):
        """A block specification; `where` is told row, KV head, part of its heads, block of keys and of queries."""
        return pl.BlockSpec(shape, lambda b, g, i, p, j, runs, widths: where(b, g, p, i, there(b, g, i, j, runs)))

    if is_turned(dim):
        key_spec = at((None, None, dim, key_block), lambda b, g, p, i, q: (b, g, 0, i))
        query_spec = at((None, None, heads, dim, query_block), lambda b, g, p, i, q: (b, g, p, 0, q))
    else:
        key_spec = at((None, None, key_block, dim), lambda b, g, p, i, q: (b, g, i, 0))
        query_spec = at((None, None, heads, query_block, dim), lambda b, g, p, i, q: (b, g, p, q, 0))
    row = at((None, 1, query_block), lambda b, g, p, i, q: (b, 0, q))
    specs = [
        key_spec,
        query_spec,
        at((None, None, group, query_block), lambda b, g, p, i, q: (b, g, 0, q)),
        row,
        at((None, None, 1, key_block), lambda b, g, p, i, q: (b, g, 0, i)),
    ]
    operands = [turn(keys), turn(queries), lse, query_positions[:, None], key_positions[:, :, None]]
    if segments is not None:
        specs += [row, at((None, 1, key_block), lambda b, g, p, i, q: (b, 0, i))]
        operands += [labels[:, None] for labels in segments]
    if votes is not None:
        specs.append(at((None, len(columns), query_block), lambda b, g, p, i, q: (b, 0, q)))
        operands.append(votes)
    out = at((None, None, parts, key_block), lambda b, g, p, i, q: (b, g, 0, i))
    found = pl.pallas_call(
        partial(
            _kernel, columns=tuple(columns), scale=scale, window=window, softcap=softcap, dim=dim,
            segmented=segments is not None, voting=votes is not None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, counts[0], parts, counts[1]),
            in_specs=specs,
            out_specs=[out] * len(columns),
            scratch_shapes=[pltpu.VMEM((key_block, LANES), jnp.float32)] * len(columns),
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, kv_heads, parts, total), jnp.float32)] * len(columns),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        name="prefill_attention_columns",
    )(runs.reshape(-1), flat_widths, *operands)  # fmt: skip
    return [jnp.broadcast_to(array, (batch, kv_heads, group, total)) for array in found]
