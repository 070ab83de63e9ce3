"""Prefill attention, plainly: the whole S x S softmax in float32, and every statistic read off it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.logits import scaled_logits, softmax_rows, visible


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
    columns: tuple[str, ...] = (),
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> tuple[Float[Array, "B G R T V"], Float[Array, "B G R T"], dict[str, Float[Array, "B G R S"]]]:
    """See `kvx.kernels.prefill_attention.prefill_attention`."""
    wide = [array.astype(jnp.float32) for array in (queries, keys, values)]
    logits = scaled_logits(wide[0], wide[1][:, :, None], scale, softcap)
    seen = visible(query_positions[:, None, None, :, None], key_positions[:, :, None, None, :], window)
    if segments is not None:
        seen &= (segments[0][:, :, None] == segments[1][:, None, :])[:, None, None]
    probabilities, lse = softmax_rows(jnp.where(seen, logits, -jnp.inf))
    reduced = {name: COLUMNS[name](probabilities) for name in columns}
    return jnp.einsum("bgrts,bgsv->bgrtv", probabilities, wide[2]), lse, reduced


COLUMNS = {
    "sum": lambda p: jnp.sum(p, axis=-2),
    "square": lambda p: jnp.sum(p * p, axis=-2),
    "max": lambda p: jnp.max(p, axis=-2),
}
"""Reductions over queries of the probabilities (..., T, S) that a key received."""
