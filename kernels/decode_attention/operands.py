"""What attention reads: rows of numbers, in full precision or 8 bits, and the exact tail behind a packed cache.

Low-bit codes are `kvx.kernels.quantize_pack.coded`; a plain array stands for `Rows` of it.
"""

from dataclasses import field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Int, Int8

from kvx.kernels.pytree import pytree
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes


@pytree
class Rows:
    """A row of D numbers for each of C slots: array * scale.

    Attributes:
        array: (B, G, C, D), or (B, G, D, C) if the slots are last: a head dim below 128 fills a TPU's lanes only so,
            otherwise XLA copies the cache into padded lanes at every call. Float, or int8 or float8_e4m3fn with a
            scale.
        scale: of each slot, or one a head (B, G, 1, 1), float32; None: ones. The axis of one is what a kernel fetches:
            a TPU's compiler lays (B, 3, C) heads first and moves it at every call, (B, 3, 1, C) it leaves alone.
        slots_last: static.
    """

    array: Float[Array, "B G m n"] | Int8[Array, "B G m n"] | Float8e4m3fn[Array, "B G m n"]
    scale: Float[Array, "B G 1 #C"] | None = None
    slots_last: bool = field(default=False, metadata={"static": True})

    @classmethod
    def encode(cls, rows: Float[Array, "B G C D"], dtype: jax.typing.DTypeLike, slots_last: bool = False) -> "Rows":
        """Rows in int8 or float8_e4m3fn, symmetric, each slot's largest magnitude at the end of the range."""
        top = 127.0 if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).max)
        largest = jnp.max(jnp.abs(rows.astype(jnp.float32)), axis=-1)
        scale = jnp.where(largest > 0, largest / top, 1.0)
        steps = rows.astype(jnp.float32) / scale[..., None]
        steps = jnp.round(steps) if jnp.issubdtype(dtype, jnp.integer) else jnp.clip(steps, -top, top)
        array = steps.astype(dtype)
        return cls(jnp.swapaxes(array, -1, -2) if slots_last else array, scale[:, :, None], slots_last)

    @property
    def slots(self) -> int:
        """C."""
        return self.array.shape[-1 if self.slots_last else -2]

    @property
    def width(self) -> int:
        """D."""
        return self.array.shape[-2 if self.slots_last else -1]


Operand = Rows | ChannelCodes | TokenCodes
"""Keys or values by slot."""


@pytree
class Tail:
    """Tokens at full precision that are read in the same softmax, such as those that are not yet coded.

    Attributes:
        keys, values: rows of the E entries.
        positions: true positions, -1 where empty.
    """

    keys: Float[Array, "B G E D"]
    values: Float[Array, "B G E V"]
    positions: Int[Array, "B G E"]
