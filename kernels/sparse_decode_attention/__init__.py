"""Sparse decode attention: of everything held, only the pages or slots that were chosen for this query are read."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.checks import check_shape
from kvx.kernels.merge_partials import Partial
from kvx.kernels.over_mesh import ROWS
from kvx.kernels.ragged_decode_attention import BOTH, attend, check
from kvx.kernels.ragged_decode_attention.reads import Reads
from kvx.kernels.sparse_decode_attention import xla
from kvx.kernels.sparse_decode_attention.choices import by_choice, by_head


def sparse_decode_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G C E"],
    values: Float[Array, "B G C V"] | None,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G C"],
    chosen: Int[Array, "B G K U N"],
    *,
    page: int,
    scale: float,
    value_dim: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    tuning: Any = None,
) -> Partial:
    """Partial softmax over the chosen pages of each head's slots (Quest, Tang et al. 2024; TidalDecode, Yang et al.).

    Args:
        queries: rotated, R query heads for each KV head, bfloat16 or float32.
        keys: rotated, a whole number of pages of slots.
        values: None: the last V channels of a row of keys are its value, as of `ragged_decode_attention`.
        query_positions: true positions.
        key_positions: true positions, -1 where a slot is empty.
        chosen: indices of distinct pages, from the first -1 on none; K choices of a KV head, each for R / K of its
            query heads in turn, and one for each query (U = T) or for all of them (U = 1).
        page: slots a page; 1: slots are chosen singly.
        scale: of the logits.
        value_dim: V, where `values` is None; None: E - D.
        window: sliding window in positions, or None.
        softcap: logits become softcap tanh(logits / softcap), or None.
        implementation: "reference", "xla", "mosaic_tpu" (whole tiles of slots a page: 16 in bfloat16, 8 in float32),
            "triton"; None: the best that takes these arguments on the platform compiled for.
        tuning: the implementation's own `Tuning`, or None.

    Returns:
        out (B, G, R, T, V) and lse (B, G, R, T), float32; (0, -inf) where nothing is chosen.

    Raises:
        ValueError: arguments that do not belong together, or a named implementation that does not take them.
    """
    value_dim = check(queries, keys, values, value_dim, query_positions, key_positions, window, softcap)
    check_shape("keys", keys, (*queries.shape[:2], None, None))
    check_shape("key_positions", key_positions, keys.shape[:3])
    check_shape("chosen", chosen, (*queries.shape[:2], None, None, None))
    group, length = queries.shape[2:4]
    capacity, width = keys.shape[2:]
    sets, spread, count = chosen.shape[2:]
    if page < 1 or capacity % page:
        raise ValueError(f"page is {page}, allowed are divisors of the {capacity} slots")
    if group % sets:
        raise ValueError(f"chosen has {sets} choices a KV head, allowed are divisors of its {group} query heads")
    if spread not in (1, length):
        raise ValueError(f"chosen has choices for {spread} queries, allowed are 1 or {length}")

    def form(queries, keys, values, query_positions, key_positions, chosen):
        batch, heads = queries.shape[:2]
        heads_first = (jnp.arange(batch * heads, dtype=jnp.int32) * (capacity // page)).reshape(batch, heads, 1, 1, 1)
        table = jnp.where(chosen >= 0, chosen + heads_first, 0).astype(jnp.int32)
        reads = Reads(
            by_choice(queries, sets, spread),
            keys.reshape(-1, width),
            None if values is None else values.reshape(-1, values.shape[-1]),
            value_dim,
            (jnp.sum(chosen >= 0, axis=-1, dtype=jnp.int32) * page).reshape(-1),
            None,
            table.reshape(-1, count),
            page,
            count * page,
            by_choice(jnp.broadcast_to(query_positions[:, None, None], queries.shape[:4]), sets, spread),
            key_positions,
        )
        shape = (batch, heads, sets, spread, group // sets, length // spread)
        return reads, lambda part: by_head(part, shape)

    arrays = queries, keys, values, query_positions, key_positions, chosen
    axes = BOTH, BOTH, BOTH, ROWS, BOTH, BOTH
    masking = {"scale": scale, "window": window, "softcap": softcap}
    plain = partial(
        xla.attend, queries, keys, values, query_positions, key_positions, chosen, page, value_dim=value_dim, **masking
    )
    return attend("sparse_decode_attention", form, arrays, axes, plain, masking, implementation, tuning)
