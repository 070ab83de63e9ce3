"""Attention of a batch over a prefix that all its rows share and each row's own slots: the prefix is read once."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.decode_attention import decode_attention
from kvx.kernels.merge_partials import Partial, merge_partials

FURTHEST = jnp.iinfo(jnp.int32).max
"""A position that every key comes before."""


def shared_prefix_attention(
    queries: Float[Array, "B G R T D"],
    prefix_keys: Float[Array, "G P D"],
    prefix_values: Float[Array, "G P V"],
    keys: Any,
    values: Any,
    query_positions: Int[Array, "B T"],
    prefix_positions: Int[Array, "G P"],
    key_positions: Int[Array, "B G C"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Partial:
    """Partial softmax over a shared prefix and each row's own suffix (Hydragen, Juravsky et al. 2024, section 3).

    Args:
        queries: rotated queries, R query heads for each KV head.
        prefix_keys, prefix_values: rotated keys and values of the prefix, once for the batch.
        keys, values: each row's own, (B, G, C, D) and (B, G, C, V) or any operand of `decode_attention`.
        query_positions: true positions; -1 sees nothing. Every query comes after the prefix.
        prefix_positions, key_positions: true positions by slot, -1 where empty.
        scale, window, softcap: as in `kvx.decoder.AttentionSpec`.
        implementation: of `decode_attention`, for both parts.

    Returns:
        out (B, G, R, T, V) and lse (B, G, R, T), float32.
    """
    options = {"scale": scale, "window": window, "softcap": softcap, "implementation": implementation}
    prefix = prefix_attention(queries, prefix_keys, prefix_values, query_positions, prefix_positions, **options)
    own = decode_attention(queries, keys, values, query_positions, key_positions, **options)
    return merge_partials(prefix, own)


def prefix_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "G P D"],
    values: Float[Array, "G P V"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "G P"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Partial:
    """The prefix's part: the queries of the whole batch are the rows of one matrix, with no causal order between them.

    They are all after the prefix, so that no mask tells them apart; with a sliding window, which may end inside the
    prefix at a different token for each row, each keeps its own position. Arguments as above.
    """
    batch, kv_heads, group, length, dim = queries.shape
    options = {"scale": scale, "window": window, "softcap": softcap, "implementation": implementation}
    if window is None:
        # As so many more query heads of one token: the fewer positions, the less a kernel has to compare.
        together = jnp.moveaxis(queries, 0, 1).reshape(1, kv_heads, batch * group * length, 1, dim)
        spots = jnp.full((1, 1), FURTHEST, jnp.int32)
        part = decode_attention(together, keys[None], values[None], spots, key_positions[None], **options)
        shape, batch_axis = (kv_heads, batch, group, length), 1
    else:
        together = jnp.moveaxis(queries, 0, 2).reshape(1, kv_heads, group, batch * length, dim)
        spots = query_positions.reshape(1, batch * length)
        part = decode_attention(together, keys[None], values[None], spots, key_positions[None], **options)
        shape, batch_axis = (kv_heads, group, batch, length), 2
    out = jnp.moveaxis(part.out.reshape(*shape, -1), batch_axis, 0)
    lse = jnp.moveaxis(part.lse.reshape(shape), batch_axis, 0)
    seeing = (query_positions >= 0)[:, None, None]
    return Partial(out=jnp.where(seeing[..., None], out, 0.0), lse=jnp.where(seeing, lse, -jnp.inf))
