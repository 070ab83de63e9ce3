"""Balancing: one factor a key channel that shares out a channel's size between keys and queries (grid 2, transform)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

DEAD = 1e-3
"""Peaks below this share of the head's largest count as this share: a dead channel would make a factor 0 or infinite,
and one that wakes up later would drown its group."""


def balance(query_peak: Float[Array, "B G D"], key_peak: Float[Array, "B G D"]) -> Float[Array, "B G D"]:
    """beta_c = sqrt(max_t |q_tc| / max_t |k_tc|), float32 (MiKV, Yang et al. 2024).

    Keys times beta and queries over beta have the same channel maxima, sqrt(max |q_c| max |k_c|), and the same product
    as before.

    Args:
        query_peak, key_peak: channel maxima over the prompt, rotated; of the queries over all that read the KV head.
    """
    return jnp.sqrt(_alive(query_peak) / _alive(key_peak))


def _alive(peak: Float[Array, "B G D"]) -> Float[Array, "B G D"]:
    peak = peak.astype(jnp.float32)
    # The smallest normal float stands in where a whole head is dead.
    return jnp.maximum(peak, jnp.maximum(DEAD * jnp.max(peak, axis=-1, keepdims=True), 1e-30))
