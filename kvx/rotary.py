"""Rotary position embedding: rotate unrotated queries and keys by any positions.

Stores receive unrotated queries and decide at which positions to rotate; so rotation is a value that travels with
the layer, not something a model does in passing.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.pytree import pytree


@pytree
class Rotary:
    """RoPE in the half-split layout of Hugging Face checkpoints (Su et al. 2021, equation 34).

    Channel i of the first half is paired with channel i of the second half of the rotated span, the first
    `2 * len(frequencies)` channels; the remaining channels pass unchanged (partial rotary).

    Attributes:
        frequencies: radians per position, one per pair, float32, scaling (Llama 3, linear) already applied.
        magnitude: factor on cos and sin (YaRN's attention factor; 1 elsewhere).
    """

    frequencies: Float[Array, "P"]
    magnitude: Float[Array, ""] | float = 1.0

    def __call__(self, x: Float[Array, "*batch D"], positions: Int[Array, "*#batch"]) -> Float[Array, "*batch D"]:
        """Rotate `x` (..., D) at integer `positions` that broadcast against its leading axes; float32 inside."""
        pairs = self.frequencies.shape[0]
        angle = positions[..., None].astype(jnp.float32) * self.frequencies
        cos, sin = jnp.cos(angle) * self.magnitude, jnp.sin(angle) * self.magnitude
        first, second = x[..., :pairs].astype(jnp.float32), x[..., pairs : 2 * pairs].astype(jnp.float32)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
        return turned if 2 * pairs == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * pairs :]], axis=-1)
