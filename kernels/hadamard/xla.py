"""The Walsh-Hadamard transform in plain XLA: the matrix of a b channels is the product of those of a and of b."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvx.kernels.hadamard.reference import signs


def hadamard(x: Float[Array, "*batch N M"], *, axis: int, tuning: Any = None) -> Float[Array, "*batch N M"]:
    """See `kvx.kernels.hadamard.hadamard`. Two small matmuls: 2 (a + b) operations a number instead of 2 a b."""
    channels = x.shape[axis]
    first = 1 << (channels.bit_length() - 1) // 2
    wide = x.astype(jnp.float32)
    left, right = jnp.asarray(signs(first)), jnp.asarray(signs(channels // first))
    if axis == -1:
        parts, mixed = wide.reshape(*x.shape[:-1], first, -1), "ia,jb,...ab->...ij"
    else:
        parts, mixed = wide.reshape(*x.shape[:-2], first, -1, x.shape[-1]), "ia,jb,...abm->...ijm"
    product = jnp.einsum(mixed, left, right, parts, precision=jax.lax.Precision.HIGHEST)
    return (product.reshape(x.shape) * channels**-0.5).astype(x.dtype)
