"""Chance: numbers drawn for tokens, the same in whatever batch, slot or chunk a token happens to be."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

HEADS = 2**16
"""More KV heads than any layer has, so that layer and head make one number."""


def uniforms(seed: int, layer: Int[Array, ""], positions: Int[Array, "B G N"]) -> Float[Array, "B G N"]:
    """A float32 number in [0, 1) for every token of every KV head, by (seed, layer, head, true position) alone.

    Equal rows of a batch draw equally, and a row draws as it would alone.
    """

    def draw(head, position):
        # Few hashes, since each adds to what has to be compiled for every layer.
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(start, layer * HEADS + head), position))

    start = jax.random.key(seed)
    heads = jnp.broadcast_to(jnp.arange(positions.shape[1], dtype=jnp.int32)[:, None], positions.shape)
    drawn = jax.vmap(draw)(heads.reshape(-1), positions.reshape(-1))
    return drawn.reshape(positions.shape)
