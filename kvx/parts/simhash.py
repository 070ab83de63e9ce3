"""SimHash: signs of random projections, packed into words; two codes differ in a share angle / pi of their bits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

WORD = 32


def hyperplanes(seed: int, layer: Int[Array, ""], bits: int, dim: int) -> Float[Array, "N D"]:
    """The normals of a layer's random hyperplanes, i.i.d. N(0, 1), by (seed, layer) alone: derived, never stored."""
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), layer), (bits, dim), jnp.float32)


def simhash(vectors: Float[Array, "*batch D"], planes: Float[Array, "N D"]) -> UInt32[Array, "*batch W"]:
    """Bit n of the code is 1[planes_n . x > 0] (0 for a vector of zeros), in W = ceil(N / 32) words, low bits first."""
    sides = jnp.einsum("...d,nd->...n", vectors.astype(jnp.float32), planes, precision="highest") > 0
    padded = jnp.pad(sides, [(0, 0)] * (sides.ndim - 1) + [(0, -len(planes) % WORD)])
    words = padded.reshape(*padded.shape[:-1], -1, WORD).astype(jnp.uint32)
    return jnp.sum(words << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def hamming(first: UInt32[Array, "*batch W"], second: UInt32[Array, "*other W"]) -> Int[Array, "*both"]:
    """Bits in which two codes differ; the leading axes broadcast."""
    return jnp.sum(jax.lax.population_count(first ^ second), axis=-1, dtype=jnp.int32)
