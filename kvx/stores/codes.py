"""Writing into arrays of low-bit codes: a block of slots at a time where groups run along slots, else a slot at a time.

The arrays themselves are the kernels' (`kvx.kernels.quantize_pack.coded`): one layout for stores and kernels.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from kvx.kernels.implementations import target_platform
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes
from kvx.kernels.write_lanes import write_lanes
from kvx.stores.slots import scatter


def write_blocks(codes: ChannelCodes, blocks: Int[Array, "B G m"], new: ChannelCodes) -> ChannelCodes:
    """With the blocks of `new` at these indices, ascending; an index beyond the last writes nothing."""
    fresh = new.ranges.shape[-2]

    def put_words(array, words):
        rows = jnp.moveaxis(words.reshape(*words.shape[:3], fresh, -1), 3, 2)
        return write_lanes(array, blocks, rows)

    return replace(
        codes,
        words=put_words(codes.words, new.words),
        ranges=_put_ranges(codes, blocks, new.ranges),
        lower=codes.lower if codes.lower is None or new.lower is None else put_words(codes.lower, new.lower),
    )


def _put_ranges(
    codes: ChannelCodes, blocks: Int[Array, "B G m"], new: UInt32[Array, "B G m D"]
) -> UInt32[Array, "B G M D"]:
    if target_platform() == "tpu" and codes.groups_last:
        # As they lie there; a scatter would turn all of them about and back.
        return jnp.swapaxes(write_lanes(jnp.swapaxes(codes.ranges, 2, 3), blocks, new[..., None]), 2, 3)
    return scatter(codes.ranges, blocks, new)


def write_slots(codes: TokenCodes, slots: Int[Array, "B G m"], new: TokenCodes) -> TokenCodes:
    """With the slots of `new` at these indices, ascending; a slot beyond the last writes nothing."""

    lower = codes.lower
    return replace(
        codes,
        words=write_columns(codes.words, slots, new.words),
        ranges=write_columns(codes.ranges, slots, new.ranges),
        lower=lower if lower is None or new.lower is None else write_columns(lower, slots, new.lower),
    )


def write_columns(
    array: Shaped[Array, "B G W C"], slots: Int[Array, "B G m"], columns: Shaped[Array, "B G W m"]
) -> Shaped[Array, "B G W C"]:
    """With the columns of these slots, ascending, overwritten; a slot beyond the last writes nothing."""
    return write_lanes(array, slots, jnp.swapaxes(columns, -1, -2)[..., None])


def never(numbers: Float[Array, "B G *rest"]) -> Bool[Array, "B G 1"]:
    """False, once these numbers are known, as no compiler can tell: what depends on it comes after them."""
    axes = tuple(range(2, numbers.ndim))
    return jnp.any(jnp.isinf(numbers) & jnp.isnan(numbers), axis=axes)[..., None]
