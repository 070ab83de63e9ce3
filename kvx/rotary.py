"""Rotary position embedding: rotate unrotated queries and keys by any positions.

Stores receive unrotated queries and decide at which positions to rotate; so rotation is a value that travels with
the layer, not something a model does in passing.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.pytree import pytree


@pytree
class Turn:
    """A rotation of pairs of channels by known angles; to be had from `Rotary.turn`.

    Attributes:
        cos, sin: of each pair's angle, times a magnitude.
    """

    cos: Float[Array, "*batch P"]
    sin: Float[Array, "*batch P"]

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Rotate `x` (..., D), against whose leading axes the angles broadcast; float32 inside."""
        pairs = self.cos.shape[-1]
        first, second = x[..., :pairs].astype(jnp.float32), x[..., pairs : 2 * pairs].astype(jnp.float32)
        turned = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        turned = jnp.concatenate(turned, axis=-1).astype(x.dtype)
        return turned if 2 * pairs == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * pairs :]], axis=-1)


@pytree
class Rotary:
    """RoPE in the half-split layout of Hugging Face checkpoints (Su et al. 2021, equation 34).

    Channel i of the first half is paired with channel i of the second half of the rotated span, the first
    `2 * len(frequencies)` channels; the remaining channels pass unchanged (partial rotary).

    Attributes:
        frequencies: radians per position, one per pair, float32, scaling (Llama 3, linear) already applied.
        magnitude: factor on cos and sin (YaRN's attention factor; 1 elsewhere).
        held_whole: class attribute; on a mesh every device holds all of it, though its length may equal the rows.
    """

    frequencies: Float[Array, "P"]
    magnitude: Float[Array, ""] | float = 1.0
    held_whole: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Channels that are rotated."""
        return 2 * self.frequencies.shape[0]

    def __call__(self, x: Float[Array, "*batch D"], positions: Int[Array, "*#batch"]) -> Float[Array, "*batch D"]:
        """Rotate `x` (..., D) at integer `positions` that broadcast against its leading axes; float32 inside."""
        return self.turn(positions)(x)

    def turn(self, positions: Int[Array, "*batch"]) -> Turn:
        """The rotation to these positions, for whatever is rotated to them."""
        return self._turn(positions, self.magnitude)

    def back(self, x: Float[Array, "*batch D"], positions: Int[Array, "*#batch"]) -> Float[Array, "*batch D"]:
        """What was rotated at these positions, as it was before."""
        return self._turn(-positions, 1 / self.magnitude)(x)

    def onwards(self, x: Float[Array, "*batch D"], distance: Int[Array, "*#batch"]) -> Float[Array, "*batch D"]:
        """What was rotated at any position p as if at p + distance: R(p + d) = R(d) R(p), the magnitude is in it."""
        return self._turn(distance, 1.0)(x)

    def _turn(self, positions: Int[Array, "*batch"], magnitude: Float[Array, ""] | float) -> Turn:
        angle = positions[..., None].astype(jnp.float32) * self.frequencies
        return Turn(jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude)
