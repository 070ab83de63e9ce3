"""A scatter along the slots: the form of which XLA on a CPU makes no copy."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def write_lanes(
    array: Shaped[Array, "B G D C"], blocks: Int[Array, "B G m"], rows: Shaped[Array, "B G m D n"]
) -> Shaped[Array, "B G D C"]:
    """See `kvx.kernels.write_lanes.write_lanes`."""
    by_block = array.reshape(*array.shape[:3], -1, rows.shape[4])
    if blocks.size == 1:
        # XLA turns a scatter of one row into a dynamic_update_slice; so there is a second, beyond the end, dropped.
        blocks = jnp.concatenate([blocks, jnp.full_like(blocks, by_block.shape[3] + 1)], axis=-1)
        rows = jnp.concatenate([rows, rows], axis=2)
    batch, heads = jnp.ogrid[: array.shape[0], : array.shape[1]]
    written = by_block.at[batch[..., None], heads[..., None], :, blocks].set(
        rows, mode="drop", unique_indices=True, indices_are_sorted=True
    )
    return written.reshape(array.shape)
