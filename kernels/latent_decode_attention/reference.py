"""Latent decode attention, plainly: rows decoded to float32, every logit masked, one softmax."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.latent_decode_attention.operands import Rows, slots_first
from kvx.kernels.logits import scaled_logits, softmax_rows, visible
from kvx.kernels.merge_partials import Partial


def latent_decode_attention(
    queries: Float[Array, "B T H D"],
    rows: Rows,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B C"] | None,
    bias: Float[Array, "B C"] | None,
    *,
    value_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    slots_last: bool,
    tuning: Any = None,
) -> Partial:
    """See `kvx.kernels.latent_decode_attention.latent_decode_attention`."""
    keys = slots_first(rows, slots_last).astype(jnp.float32)
    places = jnp.arange(keys.shape[1])[None] if key_positions is None else key_positions
    logits = scaled_logits(queries.astype(jnp.float32), keys[:, None], scale, softcap)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[:, None, None]
    seen = visible(query_positions[:, :, None, None], places[:, None, None, :], window)
    probabilities, lse = softmax_rows(jnp.where(seen, logits, -jnp.inf))
    values = keys[..., keys.shape[-1] - value_dim :]
    return Partial(out=jnp.einsum("bthc,bcv->bthv", probabilities, values), lse=lse)
