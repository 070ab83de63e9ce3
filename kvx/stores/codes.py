"""Writing into arrays of low-bit codes: a block of slots at a time where groups run along slots, else a slot at a time.

The arrays themselves are the kernels' (`kvx.kernels.quantize_pack.coded`): one layout for stores and kernels.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes
from kvx.stores.dense import scatter


def write_blocks(codes: ChannelCodes, blocks: Int[Array, "B G m"], new: ChannelCodes) -> ChannelCodes:
    """With the blocks of `new` at these indices, ascending; an index beyond the last writes nothing."""
    count, fresh = codes.ranges.shape[-2], new.ranges.shape[-2]

    def put_words(array, words):
        by_block = array.reshape(*array.shape[:3], count, -1)
        rows = jnp.moveaxis(words.reshape(*words.shape[:3], fresh, -1), 3, 2)
        return _put(by_block, blocks, rows).reshape(array.shape)

    return replace(
        codes,
        words=put_words(codes.words, new.words),
        ranges=scatter(codes.ranges, blocks, new.ranges),
        lower=codes.lower if codes.lower is None or new.lower is None else put_words(codes.lower, new.lower),
    )


def write_slots(codes: TokenCodes, slots: Int[Array, "B G m"], new: TokenCodes) -> TokenCodes:
    """With the slots of `new` at these indices, ascending; a slot beyond the last writes nothing."""

    def put(array, columns):
        return _put(array, slots, jnp.swapaxes(columns, -1, -2))

    return replace(
        codes,
        words=put(codes.words, new.words),
        ranges=put(codes.ranges, new.ranges),
        lower=codes.lower if codes.lower is None or new.lower is None else put(codes.lower, new.lower),
    )


def _put(
    array: Shaped[Array, "B G w n *rest"], index: Int[Array, "B G m"], rows: Shaped[Array, "B G m w *rest"]
) -> Shaped[Array, "B G w n *rest"]:
    """Rows written along the fourth axis, in place: the form of which XLA on CPU makes no copy."""
    if index.size == 1:
        # XLA turns a scatter of one row into a dynamic_update_slice; so there is a second, beyond the end, dropped.
        index = jnp.concatenate([index, jnp.full_like(index, array.shape[3] + 1)], axis=-1)
        rows = jnp.concatenate([rows, rows], axis=2)
    batch, heads = jnp.ogrid[: array.shape[0], : array.shape[1]]
    return array.at[batch[..., None], heads[..., None], :, index].set(
        rows, mode="drop", unique_indices=True, indices_are_sorted=True
    )


def never(numbers: Float[Array, "B G *rest"]) -> Bool[Array, "B G 1"]:
    """False, once these numbers are known, as no compiler can tell: what depends on it comes after them."""
    axes = tuple(range(2, numbers.ndim))
    return jnp.any(jnp.isinf(numbers) & jnp.isnan(numbers), axis=axes)[..., None]
