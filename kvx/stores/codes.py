"""Arrays of low-bit codes by slot: keys whose groups run along tokens, values whose groups run along channels."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, UInt32

from kvx.kernels.quantize_pack import dequantize, pack, quantize, unpack
from kvx.pytree import pytree, static


@pytree
class ChannelCodes:
    """One range for each channel and block of n slots (KIVI's keys), written a whole block at a time.

    Keys have channels that are large for every token; so grouped, such a channel spoils only its own groups. The words
    run along the channels of a slot nevertheless, whatever the grouping, so that a slot's codes lie together.
    """

    words: UInt32[Array, "B G M n w"]
    scale: BFloat16[Array, "B G M D"]
    minimum: BFloat16[Array, "B G M D"]
    bits: int = static()

    @classmethod
    def encode(cls, rows: Float[Array, "B G P D"], bits: int, group: int) -> "ChannelCodes":
        """Rows in blocks of `group`, which divides their number."""
        blocks = rows.reshape(*rows.shape[:2], -1, group, rows.shape[-1])
        codes, scale, minimum = quantize(jnp.swapaxes(blocks, -1, -2), bits)
        return cls(pack(jnp.swapaxes(codes, -1, -2), bits), scale, minimum, bits)

    def decode(self) -> Float[Array, "B G P D"]:
        """c * s + m, float32."""
        codes = unpack(self.words, self.bits).astype(jnp.float32)
        wide = codes * _row(self.scale) + _row(self.minimum)
        return wide.reshape(*wide.shape[:2], -1, wide.shape[-1])

    def write(self, blocks: Int[Array, "B G m"], codes: "ChannelCodes") -> "ChannelCodes":
        """With the blocks of `codes` at these indices, ascending; an index beyond the last writes nothing."""
        return replace(
            self,
            words=scatter(self.words, blocks, codes.words),
            scale=scatter(self.scale, blocks, codes.scale),
            minimum=scatter(self.minimum, blocks, codes.minimum),
        )


@pytree
class TokenCodes:
    """One range for each slot and run of n channels (KIVI's values), written a slot at a time."""

    words: UInt32[Array, "B G P w"]
    scale: BFloat16[Array, "B G P h"]
    minimum: BFloat16[Array, "B G P h"]
    bits: int = static()

    @classmethod
    def encode(cls, rows: Float[Array, "B G P V"], bits: int, group: int) -> "TokenCodes":
        """Rows in runs of `group` channels, which divides their width."""
        codes, scale, minimum = quantize(rows.reshape(*rows.shape[:3], -1, group), bits)
        return cls(pack(codes.reshape(rows.shape), bits), scale, minimum, bits)

    def decode(self) -> Float[Array, "B G P V"]:
        """c * s + m, float32."""
        codes = unpack(self.words, self.bits)
        runs = codes.reshape(*self.scale.shape, -1)
        return dequantize(runs, self.scale, self.minimum).reshape(codes.shape)

    def write(self, slots: Int[Array, "B G m"], codes: "TokenCodes") -> "TokenCodes":
        """With the rows of `codes` in these slots, ascending; a slot beyond the last writes nothing."""
        return replace(
            self,
            words=scatter(self.words, slots, codes.words),
            scale=scatter(self.scale, slots, codes.scale),
            minimum=scatter(self.minimum, slots, codes.minimum),
        )


def scatter(array: Array, index: Int[Array, "B G m"], rows: Array) -> Array:
    """Rows (B, G, m, ...) written in place along the third axis at ascending indices; those beyond the end are dropped.

    The form of which XLA makes no copy of the array; a conditional or `where` around it would.
    """
    batch, heads = jnp.ogrid[: array.shape[0], : array.shape[1]]
    return array.at[batch[..., None], heads[..., None], index].set(
        rows.astype(array.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
    )


def _row(ranges: BFloat16[Array, "B G M D"]) -> Float[Array, "B G M 1 D"]:
    return ranges.astype(jnp.float32)[:, :, :, None]
