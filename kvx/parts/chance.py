"""Chance: numbers drawn for tokens, the same in whatever batch, slot or chunk a token happens to be."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def uniforms(seed: int, layer: Int[Array, ""], positions: Int[Array, "B G N"]) -> Float[Array, "B G N"]:
    """A float32 number in [0, 1) for every token of every KV head, by (seed, layer, head, true position) alone.

    Equal rows of a batch draw equally, and a row draws as it would alone.
    """

    def draw(head, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(start, layer), head), position)
        return jax.random.uniform(key)

    start = jax.random.key(seed)
    heads = jnp.broadcast_to(jnp.arange(positions.shape[1])[:, None], positions.shape)
    drawn = jax.vmap(draw)(heads.reshape(-1), positions.reshape(-1))
    return drawn.reshape(positions.shape)
