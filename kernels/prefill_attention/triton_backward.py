"""The backward pass on a GPU through Pallas-Triton: one kernel for queries, one for keys and values; any mask.

Probabilities are recomputed from the saved log-sum-exp; the formulas are those of `gradient`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kvx.kernels.logits import tile_mask
from kvx.kernels.prefill_attention.triton_tiles import LOG2E, Logits, dot, rows_of, sweep


def _query_kernel(
    runs, queries, keys, values, d_out, lse, terms, positions, spots, *rest, logits: Logits, window, key_block: int
):
    labels, others, d_queries = (*rest,) if len(rest) == 3 else (None, None, *rest)
    query, pulled = queries[...], d_out[...]
    base, term, own = lse[...], terms[...], positions[...]
    mine: Any = None if labels is None else labels[...]

    def body(block, carry, masked):
        rows = rows_of(block, key_block)
        key = plgpu.load(keys.at[rows, :])
        scores = logits.of(query, key)
        weights = jnp.exp2(scores - base[:, None])
        if masked:
            pair = None if others is None else (mine[:, None], plgpu.load(others.at[rows])[None, :])
            seen = tile_mask(own[:, None], plgpu.load(spots.at[rows])[None, :], window, pair)
            weights = jnp.where(seen, weights, 0.0)
        d_scores = weights * (dot(pulled, plgpu.load(values.at[rows, :]), trans_b=True) + term[:, None])
        return carry + dot((d_scores * logits.slope(scores)).astype(key.dtype), key)

    d_queries[...] = sweep(runs, body, jnp.zeros(query.shape, jnp.float32)).astype(d_queries.dtype)


def _key_kernel(
    runs, keys, values, queries, d_out, lse, terms, positions, spots, *rest, logits: Logits, window, query_block: int
):
    labels, others, d_keys, d_values = (*rest,) if len(rest) == 4 else (None, None, *rest)
    key, value, spot = keys[...], values[...], spots[...]
    theirs: Any = None if others is None else others[...]

    def of_head(head, carry):
        def body(block, carry, masked):
            rows = rows_of(block, query_block)
            query, pulled = plgpu.load(queries.at[head, rows, :]), plgpu.load(d_out.at[head, rows, :])
            # Keys are the rows here, so that both products below read the tile as it lies.
            scores = logits.of(key, query)
            weights = jnp.exp2(scores - plgpu.load(lse.at[head, rows])[None, :])
            if masked:
                pair = None if labels is None else (plgpu.load(labels.at[rows])[None, :], theirs[:, None])
                seen = tile_mask(plgpu.load(positions.at[rows])[None, :], spot[:, None], window, pair)
                weights = jnp.where(seen, weights, 0.0)
            term = plgpu.load(terms.at[head, rows])[None, :]
            d_scores = weights * (dot(value, pulled, trans_b=True) + term) * logits.slope(scores)
            d_key = carry[0] + dot(d_scores.astype(query.dtype), query)
            return d_key, carry[1] + dot(weights.astype(pulled.dtype), pulled)

        return sweep(runs, body, carry)

    zero = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    d_key, d_value = jax.lax.fori_loop(0, queries.shape[0], of_head, zero)
    d_keys[...] = d_key.astype(d_keys.dtype)
    d_values[...] = d_value.astype(d_values.dtype)


def backward(
    runs: tuple[Int[Array, "B G Q 4"], Int[Array, "B G K 4"]],
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G S D"],
    values: Float[Array, "B G S V"],
    d_out: Float[Array, "B G R T V"],
    lse: Float[Array, "B G R T"],
    terms: Float[Array, "B G R T"],
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
) -> tuple[Float[Array, "B G R T D"], Float[Array, "B G S D"], Float[Array, "B G S V"]]:
    """Cotangents of queries, keys and values.

    Args:
        runs: of `reach`, for these blocks.
        d_out: in the values' dtype.
        lse: natural; a row of -inf gets and gives nothing.
        terms: `gradient.row_terms`.
    """
    batch, kv_heads, group, length, dim = queries.shape
    total, width = values.shape[2:]
    query_block, key_block = blocks
    shared = {"compiler_params": plgpu.CompilerParams(num_warps=warps, num_stages=stages), "interpret": interpret}
    labelled = () if segments is None else segments
    base = jnp.where(jnp.isfinite(lse), lse * LOG2E, jnp.inf)

    def one_head(*tail):
        def where(i, h, b):
            return b, jax.lax.div(h, group), jax.lax.rem(h, group), i, *(0 for _ in tail)

        return pl.BlockSpec((None, None, None, query_block, *tail), where)

    def all_keys(*tail):
        return pl.BlockSpec(
            (None, None, total, *tail), lambda i, h, b: (b, jax.lax.div(h, group), 0, *(0 for _ in tail))
        )

    row = pl.BlockSpec((None, query_block), lambda i, h, b: (b, i))
    d_queries = pl.pallas_call(
        partial(_query_kernel, logits=logits, window=window, key_block=key_block),
        grid=(length // query_block, kv_heads * group, batch),
        in_specs=[
            pl.BlockSpec((None, None, None, 4), lambda i, h, b: (b, jax.lax.div(h, group), i, 0)),
            one_head(dim), all_keys(dim), all_keys(width), one_head(width), one_head(), one_head(), row, all_keys(),
            *([row, pl.BlockSpec((None, total), lambda i, h, b: (b, 0))] if labelled else []),
        ],
        out_specs=one_head(dim),
        out_shape=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        name="prefill_attention_backward_queries",
        **shared,
    )(runs[0], queries, keys, values, d_out, base, terms, query_positions, key_positions, *labelled)  # fmt: skip

    def all_heads(*tail):
        return pl.BlockSpec((None, None, group, length, *tail), lambda i, g, b: (b, g, 0, 0, *(0 for _ in tail)))

    def one_block(*tail):
        return pl.BlockSpec((None, None, key_block, *tail), lambda i, g, b: (b, g, i, *(0 for _ in tail)))

    row = pl.BlockSpec((None, length), lambda i, g, b: (b, 0))
    d_keys, d_values = pl.pallas_call(
        partial(_key_kernel, logits=logits, window=window, query_block=query_block),
        grid=(total // key_block, kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, None, 4), lambda i, g, b: (b, g, i, 0)),
            one_block(dim), one_block(width), all_heads(dim), all_heads(width), all_heads(), all_heads(), row,
            one_block(), *([row, pl.BlockSpec((None, key_block), lambda i, g, b: (b, i))] if labelled else []),
        ],
        out_specs=[one_block(dim), one_block(width)],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (keys, values)],
        name="prefill_attention_backward_keys",
        **shared,
    )(runs[1], keys, values, queries, d_out, base, terms, query_positions, key_positions, *labelled)  # fmt: skip
    return d_queries, d_keys, d_values
