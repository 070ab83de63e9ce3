"""Latent decode attention in plain XLA: two matmuls over the rows, all heads' queries as one matrix."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.latent_decode_attention.operands import CodedRows, Rows, capacity, slots_first
from kvx.kernels.logits import capped, softmax_rows, visible
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
    batch, length, heads, dim = queries.shape
    places = jnp.arange(capacity(rows, slots_last))[None] if key_positions is None else key_positions
    if isinstance(rows, CodedRows):
        rows, slots_last = slots_first(rows, slots_last).astype(queries.dtype), False
    kept = "bdc" if slots_last else "bcd"
    matrix = queries.reshape(batch, length * heads, dim)
    logits = scale * jnp.einsum(f"bmd,{kept}->bmc", matrix, rows, preferred_element_type=jnp.float32)
    logits = capped(logits, softcap)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[:, None]
    seen = visible(query_positions[..., None], places[:, None], window)
    weights, lse = softmax_rows(jnp.where(jnp.repeat(seen, heads, axis=1), logits, -jnp.inf))
    # The rotary channels are mixed too and dropped after: cut off before, XLA on CPU would copy the latents.
    mixed = jnp.einsum(f"bmc,{kept}->bmd", weights.astype(rows.dtype), rows, preferred_element_type=jnp.float32)
    out = mixed[..., dim - value_dim :].reshape(batch, length, heads, value_dim)
    return Partial(out=out, lse=lse.reshape(batch, length, heads))
