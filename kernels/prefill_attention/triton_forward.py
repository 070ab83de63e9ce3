"""The first pass on a GPU through Pallas-Triton: output and log-sum-exp of any mask that positions and labels say.

One program for each block of queries of a query head; the heaviest causal blocks start first.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kvx.kernels.logits import tile_mask
from kvx.kernels.prefill_attention.triton_tiles import FLOOR, Logits, dot, rows_of, sweep


def _kernel(runs, queries, keys, values, positions, spots, *rest, logits: Logits, window: int | None, key_block: int):
    labels, others, out, lse = (*rest,) if len(rest) == 4 else (None, None, *rest)
    query = queries[...]
    own: Any = positions[...]
    mine: Any = None if labels is None else labels[...]

    def body(block, carry, masked):
        mixed, top, total = carry
        rows = rows_of(block, key_block)
        scores = logits.of(query, plgpu.load(keys.at[rows, :]))
        if masked:
            pair = None if others is None else (mine[:, None], plgpu.load(others.at[rows])[None, :])
            seen = tile_mask(own[:, None], plgpu.load(spots.at[rows])[None, :], window, pair)
            scores = jnp.where(seen, scores, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink = jnp.exp2(top - higher)
        weights = jnp.exp2(scores - higher[:, None])
        value = plgpu.load(values.at[rows, :])
        mixed = mixed * shrink[:, None] + dot(weights.astype(value.dtype), value)
        return mixed, higher, total * shrink + jnp.sum(weights, axis=1)

    size = query.shape[0]
    start = (
        jnp.zeros((size, values.shape[-1]), jnp.float32),
        jnp.full((size,), FLOOR, jnp.float32),
        jnp.zeros((size,), jnp.float32),
    )
    mixed, top, total = sweep(runs, body, start)
    divisor = jnp.where(total > 0, total, 1.0)
    out[...] = (mixed / divisor[:, None]).astype(out.dtype)
    lse[...] = jnp.where(total > 0, (top + jnp.log2(divisor)) * math.log(2), -jnp.inf)


def forward(
    runs: Int[Array, "B G Q 4"],
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G S D"],
    values: Float[Array, "B G S V"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G S"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    *,
    logits: Logits,
    window: int | None,
    blocks: tuple[int, int],
    warps: int,
    stages: int,
    interpret: bool = False,
) -> tuple[Float[Array, "B G R T V"], Float[Array, "B G R T"]]:
    """Output in the values' dtype and natural log-sum-exp; T and S are multiples of the (query, key) blocks."""
    batch, kv_heads, group, length, dim = queries.shape
    total, width = values.shape[2:]
    query_block, key_block = blocks
    count = length // query_block

    def of_query(*tail):
        return pl.BlockSpec(
            (None, None, None, query_block, *tail),
            lambda i, h, b: (b, _kv(h, group), _query(h, group), count - 1 - i, *(0 for _ in tail)),
        )

    def of_keys(*tail):
        return pl.BlockSpec((None, None, total, *tail), lambda i, h, b: (b, _kv(h, group), 0, *(0 for _ in tail)))

    specs = [
        pl.BlockSpec((None, None, None, 4), lambda i, h, b: (b, _kv(h, group), count - 1 - i, 0)),
        of_query(dim),
        of_keys(dim),
        of_keys(width),
        pl.BlockSpec((None, query_block), lambda i, h, b: (b, count - 1 - i)),
        of_keys(),
    ]
    operands = [runs, queries, keys, values, query_positions, key_positions]
    if segments is not None:
        specs.append(pl.BlockSpec((None, query_block), lambda i, h, b: (b, count - 1 - i)))
        specs.append(pl.BlockSpec((None, total), lambda i, h, b: (b, 0)))
        operands += segments
    return pl.pallas_call(
        partial(_kernel, logits=logits, window=window, key_block=key_block),
        grid=(count, kv_heads * group, batch),
        in_specs=specs,
        out_specs=[of_query(width), of_query()],
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, group, length, width), values.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, group, length), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="prefill_attention_forward",
    )(*operands)


def _kv(head, group):
    return jax.lax.div(head, group)


def _query(head, group):
    return jax.lax.rem(head, group)
