"""Attention of a few queries over cached slots: a partial softmax, and the probabilities of the slots on request."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.logits import partial_softmax, scaled_logits, slot_probabilities, visible
from kvx.kernels.merge_partials import Partial


def slot_logits(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G C D"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G C"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B G R*T C"]:
    """Masked logits with the R query heads and T queries of a KV head merged into one matrix axis.

    Merged, the product is one matmul a KV head; kept apart, XLA on CPU transposes the whole key cache.
    """
    batch, kv_heads, group, length, dim = queries.shape
    logits = scaled_logits(queries.reshape(batch, kv_heads, group * length, dim), keys, scale, softcap)
    seen = visible(query_positions[:, None, :, None], key_positions[:, :, None, :], window)
    return jnp.where(jnp.tile(seen, (1, 1, group, 1)), logits, -jnp.inf)


def decode_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G C D"],
    values: Float[Array, "B G C V"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G C"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Partial:
    """Partial softmax of rotated queries over rotated cached keys; slots at position -1 are empty.

    Returns:
        out (B, G, R, T, V) and lse (B, G, R, T), float32.
    """
    logits = slot_logits(queries, keys, query_positions, key_positions, scale=scale, window=window, softcap=softcap)
    part = partial_softmax(logits, values)
    return ungroup(part, queries.shape[2])


def decode_probabilities(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G C D"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G C"],
    lse: Float[Array, "B G R T"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B G R T C"]:
    """Probabilities of the slots under a log-sum-exp that may span more than these slots."""
    logits = slot_logits(queries, keys, query_positions, key_positions, scale=scale, window=window, softcap=softcap)
    batch, kv_heads, group, length, _ = queries.shape
    return slot_probabilities(logits.reshape(batch, kv_heads, group, length, -1), lse)


def ungroup(part: Partial, group: int) -> Partial:
    """A partial over merged (R * T) rows as one over R query heads and T queries."""
    batch, kv_heads, rows, width = part.out.shape
    shape = (batch, kv_heads, group, rows // group)
    return Partial(out=part.out.reshape(*shape, width), lse=part.lse.reshape(shape))
