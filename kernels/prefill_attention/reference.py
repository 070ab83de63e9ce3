"""Prefill attention, plainly: the whole S x S softmax in float32, and every statistic read off it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.kernels.logits import same_segment, scaled_logits, softmax_rows, visible
from kvx.kernels.prefill_attention.columns import Column, near_width
from kvx.kernels.prefill_attention.gradient import Pullback, Result


def prefill_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G S D"],
    values: Float[Array, "B G S V"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    columns: tuple[Column, ...] = (),
    lengths: Int[Array, "B"] | None = None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    visibility: Bool[Array, "N N"] | None = None,
) -> tuple[Float[Array, "B G R T V"], Float[Array, "B G R T"], dict[Column, Float[Array, "B G R S"]]]:
    """See `kvx.kernels.prefill_attention.prefill_attention`."""
    wide = [array.astype(jnp.float32) for array in (queries, keys, values)]
    logits = scaled_logits(wide[0], wide[1][:, :, None], scale, softcap)
    seen = visible(query_positions[:, None, None, :, None], key_positions[:, :, None, None, :], window)
    if segments is not None:
        seen &= same_segment(*segments, visibility)[:, None, None]
    probabilities, lse = softmax_rows(jnp.where(seen, logits, -jnp.inf))
    distance = query_positions[:, None, None, :, None] - key_positions[:, :, None, None, :]
    reduced = {column: _statistic(column, probabilities, distance, query_positions, lengths) for column in columns}
    return jnp.einsum("bgrts,bgsv->bgrtv", probabilities, wide[2]), lse, reduced


def _statistic(
    column: Column,
    p: Float[Array, "B G R T S"],
    distance: Int[Array, "B G 1 T S"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None,
) -> Float[Array, "B G R S"]:
    """One column statistic, in the order of its definition."""
    if lengths is not None:
        p = jnp.where(distance < near_width(lengths, column.near)[:, None, None, None, None], p, 0.0)
    if column.pooled:
        p = jnp.broadcast_to(jnp.mean(p, axis=2, keepdims=True), p.shape)
    mapped = p**column.power * column.votes(positions, lengths)[:, None, None, :, None]
    return jnp.max(mapped, axis=-2) if column.reduce == "max" else jnp.sum(mapped, axis=-2)


def remembering(queries, keys, values, query_positions, key_positions, **options: Any) -> tuple[Result, Pullback]:
    """The same, and its pullback as JAX derives it."""

    def twofold(queries, keys, values):
        out, lse, columns = prefill_attention(queries, keys, values, query_positions, key_positions, **options)
        return (out, lse), columns

    (out, lse), pull, columns = jax.vjp(twofold, queries, keys, values, has_aux=True)
    return (out, lse, columns), jax.tree_util.Partial(_pull, pull, lse)


def _pull(pull, lse, d_out, d_lse):
    return pull((d_out, jnp.zeros_like(lse) if d_lse is None else d_lse))
