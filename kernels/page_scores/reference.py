"""Page scores as their definition says them, channel by channel, float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def scores(queries: Float[Array, "B G R T D"], bounds: Float[Array, "B G P E"], group: str) -> Float[Array, "B G P"]:
    """-inf for an empty page."""
    batch, heads, _, _, dim = queries.shape
    rows = queries.reshape(batch, heads, -1, 1, dim).astype(jnp.float32)
    low, high = (bounds[:, :, None, :, part].astype(jnp.float32) for part in (slice(dim), slice(dim, None)))
    empty = jnp.isinf(low)
    largest = jnp.maximum(jnp.where(empty, 0.0, rows * high), jnp.where(empty, 0.0, rows * low))
    reduce = jnp.max if group == "max" else jnp.mean
    return jnp.where(empty[:, :, 0, :, 0], -jnp.inf, reduce(jnp.sum(largest, axis=-1), axis=2))
