"""The second pass on a GPU: column statistics by the saved log-sum-exp, one program for each block of keys.

A program holds its keys and meets the queries that see them block by block; probabilities live in registers only, and
so do the running statistics: as whole tiles while they are few (a reduction over the queries at every turn costs
shuffles between threads), as one number a key when they are many.
"""

from collections.abc import Sequence
from functools import partial
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kvx.kernels.logits import tile_mask
from kvx.kernels.prefill_attention.columns import Column
from kvx.kernels.prefill_attention.triton_tiles import LOG2E, Logits, dot, rows_of, sweep

TILES = 1
"""Statistics that are kept as whole tiles at most; a second one does not fit the registers of a wide block."""


def _kernel(
    runs, keys, queries, lse, positions, spots, *rest, columns: tuple[Column, ...], logits, window, blocks, segmented,
    voting, ahead,
):  # fmt: skip
    query_block, key_block = blocks
    rest = list(rest)
    labels, others = (rest.pop(0), rest.pop(0)) if segmented else (None, None)
    votes: Any = rest.pop(0) if voting else None
    widths: Any = rest.pop(0) if voting else None
    outs = rest
    key, spot = keys[...], spots[...]
    theirs: Any = None if others is None else others[...]
    heads = queries.shape[0]
    tiles = len(columns) <= TILES

    def products(block):
        rows = rows_of(block, query_block)
        return tuple(
            dot(plgpu.load(queries.at[head, rows, :]), key, trans_b=True) for head in np.arange(heads, dtype=np.int32)
        )

    def body(block, carry, masked):
        found, scores = carry
        # Tensor cores may work on the next block's products while this one's exponentials are taken.
        following = products(jnp.minimum(block + 1, runs[np.int32(3)] - 1)) if ahead else ()
        rows = rows_of(block, query_block)
        position: Any = plgpu.load(positions.at[rows]) if masked or voting else None
        mean: Any = None
        for head, score in enumerate(scores or products(block)):
            base = plgpu.load(lse.at[np.int32(head), rows])
            given = jnp.exp2(logits.scaled(score) - base[:, None])
            mean = given if mean is None else mean + given
        if heads > 1:
            mean = mean * (1 / heads)
        if masked:
            pair = None if labels is None else (plgpu.load(labels.at[rows])[:, None], theirs[None, :])
            mean = jnp.where(tile_mask(position[:, None], spot[None, :], window, pair), mean, 0.0)
        found = tuple(
            column.combine(so_far, _mapped(place, column, mean, position, rows))
            for place, (column, so_far) in enumerate(zip(columns, found, strict=True))
        )
        return found, following

    def _mapped(place, column, given, position, rows):
        if column.near < inf:
            given = jnp.where(position[:, None] - spot[None, :] < widths[np.int32(place)], given, 0.0)
        if column.power == 2:
            given = given * given
        if column.last < inf:
            given = given * plgpu.load(votes.at[np.int32(place), rows])[:, None]
        return given if tiles else column.reduced(given, axis=0)

    shape = (query_block, key_block) if tiles else (key_block,)
    start = tuple(jnp.zeros(shape, jnp.float32) for _ in columns)
    # A block of keys that nobody sees has an empty run, which may start beyond the last block.
    first = jnp.minimum(runs[np.int32(0)], queries.shape[1] // query_block - 1)
    found, _ = sweep(runs, body, (start, products(first) if ahead else ()))
    for column, out, array in zip(columns, outs, found, strict=True):
        out[...] = column.reduced(array, axis=0) if tiles else array


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
    logits: Logits,
    window: int | None,
    blocks: tuple[int, int],
    warps: int,
    stages: int,
    ahead: bool = False,
    interpret: bool = False,
) -> list[Float[Array, "B G R S"]]:
    """Statistics of columns that are all pooled, or none of them.

    Args:
        lse: natural; a row of -inf counts nowhere.
        votes, widths: of each column, what queries count for and how near is near; None if no column asks.
        ahead: form a block's products while the one before is mapped.
    """
    batch, kv_heads, group, length, dim = queries.shape
    total = keys.shape[2]
    key_block = blocks[1]
    pooled = columns[0].pooled
    # A pooled statistic needs all query heads of a KV head at once; any other is a program for each.
    heads, parts = (group, 1) if pooled else (1, group)
    base = jnp.where(jnp.isfinite(lse), lse * LOG2E, jnp.inf)

    def of_heads(*tail):
        return pl.BlockSpec(
            (None, None, heads, length, *tail),
            lambda i, h, b: (b, jax.lax.div(h, parts), jax.lax.rem(h, parts), 0, *(0 for _ in tail)),
        )

    def of_keys(*tail):
        return pl.BlockSpec(
            (None, None, key_block, *tail), lambda i, h, b: (b, jax.lax.div(h, parts), i, *(0 for _ in tail))
        )

    specs = [
        pl.BlockSpec((None, None, None, 4), lambda i, h, b: (b, jax.lax.div(h, parts), i, 0)),
        of_keys(dim),
        of_heads(dim),
        of_heads(),
        pl.BlockSpec((None, length), lambda i, h, b: (b, 0)),
        of_keys(),
    ]
    operands = [runs, keys, queries, base, query_positions, key_positions]
    if segments is not None:
        specs.append(pl.BlockSpec((None, length), lambda i, h, b: (b, 0)))
        specs.append(pl.BlockSpec((None, key_block), lambda i, h, b: (b, i)))
        operands += segments
    if votes is not None:
        specs.append(pl.BlockSpec((None, len(columns), length), lambda i, h, b: (b, 0, 0)))
        specs.append(pl.BlockSpec((None, len(columns)), lambda i, h, b: (b, 0)))
        operands += [votes, widths]
    out = pl.BlockSpec(
        (None, None, None, key_block), lambda i, h, b: (b, jax.lax.div(h, parts), jax.lax.rem(h, parts), i)
    )
    found = pl.pallas_call(
        partial(
            _kernel, columns=tuple(columns), logits=logits, window=window, blocks=blocks,
            segmented=segments is not None, voting=votes is not None, ahead=ahead,
        ),
        grid=(total // key_block, kv_heads * parts, batch),
        in_specs=specs,
        out_specs=[out] * len(columns),
        out_shape=[jax.ShapeDtypeStruct((batch, kv_heads, parts, total), jnp.float32)] * len(columns),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="prefill_attention_columns",
    )(*operands)  # fmt: skip
    return [jnp.broadcast_to(array, (batch, kv_heads, group, total)) for array in found]
