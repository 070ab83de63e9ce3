"""The Walsh-Hadamard transform, plainly: the matrix of its definition, and a product with it in float32."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def signs(channels: int) -> np.ndarray:
    """The matrix of +1 and -1 in Sylvester's order, float32; not normalised, so that it is exact in any dtype."""
    index = np.arange(channels)
    odd = np.bitwise_count(index[:, None] & index[None, :]) % 2
    return (1.0 - 2.0 * odd).astype(np.float32)


def hadamard(x: Float[Array, "*batch N M"], *, axis: int, tuning: Any = None) -> Float[Array, "*batch N M"]:
    """See `kvx.kernels.hadamard.hadamard`."""
    channels = x.shape[axis]
    matrix = jnp.asarray(signs(channels) * channels**-0.5)
    product = jnp.einsum("ij,...j->...i" if axis == -1 else "ij,...jm->...im", matrix, x.astype(jnp.float32))
    return product.astype(x.dtype)
