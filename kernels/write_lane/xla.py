"""A scatter along the last axis."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def write_lane(
    array: Float[Array, "B G D C"], slot: Int[Array, "B G"], row: Float[Array, "B G D"]
) -> Float[Array, "B G D C"]:
    """See `kvx.kernels.write_lane.write_lane`."""
    batch, heads = jnp.ogrid[: array.shape[0], : array.shape[1]]
    return array.at[batch, heads, :, slot].set(row, mode="drop", unique_indices=True, indices_are_sorted=True)
