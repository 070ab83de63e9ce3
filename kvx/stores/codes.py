"""Arrays of low-bit codes by slot: keys whose groups run along tokens, values whose groups run along channels.

Codes may be nested (Tiwari et al. 2025, "QuantSpec"): what the upper code leaves is coded once more, in as many bits,
on the same range, and lies in an array of its own. Read alone, the upper codes are an ordinary code of b bits; with the
lower ones, one of 2b.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, Float, Int, Shaped, UInt32

from kvx.kernels.quantize_pack import pack, quantize, quantize_residual, unpack
from kvx.pytree import pytree, static
from kvx.stores.dense import scatter


@pytree
class ChannelCodes:
    """One range for each channel and block of n slots (KIVI's keys), written a whole block at a time.

    Keys have channels that are large for every token; so grouped, such a channel spoils only its own groups. Slots run
    along the last axis: a block is then one range times one stretch of memory, which a CPU decodes several times as
    fast as slots by channel, and a TPU stores without padding its lanes.

    Attributes:
        words: codes of a slot's channels, w words to a slot.
        ranges: scale and minimum of each channel and block, see `_ranges`.
        lower: codes of what `words` leave, laid out alike; None: not nested.
    """

    words: UInt32[Array, "B G w P"]
    ranges: UInt32[Array, "B G D M"]
    bits: int = static()
    lower: UInt32[Array, "B G w P"] | None = None

    @classmethod
    def encode(cls, rows: Float[Array, "B G P D"], bits: int, group: int, nested: bool = False) -> "ChannelCodes":
        """Rows in blocks of `group`, which divides their number."""
        channels = jnp.swapaxes(rows, -1, -2)
        blocks = channels.reshape(*channels.shape[:3], -1, group)
        codes, scale, minimum = quantize(blocks, bits)

        def packed(codes):
            words = pack(jnp.swapaxes(codes.reshape(channels.shape), -1, -2), bits)
            return jnp.swapaxes(words, -1, -2)

        lower = packed(quantize_residual(blocks, codes, scale, minimum, bits)) if nested else None
        return cls(packed(codes), _ranges(scale, minimum), bits, lower)

    def decode(self, after: Float[Array, "B G"] | None = None, upper: bool = False) -> Float[Array, "B G D P"]:
        """c * s + m, float32, slots along the last axis as they lie; not before `after` is known.

        Args:
            upper: without what is in `lower`.
        """
        codes = _unpack_slots(_not_before(after, self.words), self.bits)
        blocks = codes.reshape(*self.ranges.shape, -1).astype(jnp.float32)
        if self.lower is not None and not upper:
            below = _unpack_slots(_not_before(after, self.lower), self.bits)
            blocks = blocks + _steps(below.reshape(blocks.shape), self.bits)
        return (blocks * self.scale[..., None] + self.minimum[..., None]).reshape(codes.shape)

    def write(self, blocks: Int[Array, "B G m"], codes: "ChannelCodes") -> "ChannelCodes":
        """With the blocks of `codes` at these indices, ascending; an index beyond the last writes nothing."""

        def put(array, rows):
            """Blocks lie along the fourth axis."""
            batch, heads = jnp.ogrid[: array.shape[0], : array.shape[1]]
            return array.at[batch[..., None], heads[..., None], :, blocks].set(
                jnp.moveaxis(rows, 3, 2), mode="drop", unique_indices=True, indices_are_sorted=True
            )

        def put_words(array, words):
            shape = (*array.shape[:3], self.ranges.shape[-1], -1)
            return put(array.reshape(shape), words.reshape(*shape[:3], codes.ranges.shape[-1], -1)).reshape(array.shape)

        return replace(
            self,
            words=put_words(self.words, codes.words),
            ranges=put(self.ranges, codes.ranges),
            lower=self.lower if self.lower is None or codes.lower is None else put_words(self.lower, codes.lower),
        )

    @property
    def scale(self) -> Float[Array, "B G D M"]:
        """s of each channel and block."""
        return _scale(self.ranges)

    @property
    def minimum(self) -> Float[Array, "B G D M"]:
        """m of each channel and block."""
        return _minimum(self.ranges)


@pytree
class TokenCodes:
    """One range for each slot and run of n channels (KIVI's values), written a slot at a time.

    Attributes:
        words: codes of a slot's channels, w words to a slot.
        ranges: scale and minimum of each slot and run, see `_ranges`.
        lower: codes of what `words` leave, laid out alike; None: not nested.
    """

    words: UInt32[Array, "B G P w"]
    ranges: UInt32[Array, "B G P h"]
    bits: int = static()
    lower: UInt32[Array, "B G P w"] | None = None

    @classmethod
    def encode(cls, rows: Float[Array, "B G P V"], bits: int, group: int, nested: bool = False) -> "TokenCodes":
        """Rows in runs of `group` channels, which divides their width."""
        runs = rows.reshape(*rows.shape[:3], -1, group)
        codes, scale, minimum = quantize(runs, bits)
        lower = None
        if nested:
            lower = pack(quantize_residual(runs, codes, scale, minimum, bits).reshape(rows.shape), bits)
        return cls(pack(codes.reshape(rows.shape), bits), _ranges(scale, minimum), bits, lower)

    def decode(self, after: Float[Array, "B G"] | None = None, upper: bool = False) -> Float[Array, "B G P V"]:
        """c * s + m, float32; not before `after` is known.

        Args:
            upper: without what is in `lower`.
        """
        codes = unpack(_not_before(after, self.words), self.bits)
        runs = codes.reshape(*self.ranges.shape, -1).astype(jnp.float32)
        if self.lower is not None and not upper:
            below = unpack(_not_before(after, self.lower), self.bits)
            runs = runs + _steps(below.reshape(runs.shape), self.bits)
        return (runs * self.scale[..., None] + self.minimum[..., None]).reshape(codes.shape)

    def write(self, slots: Int[Array, "B G m"], codes: "TokenCodes") -> "TokenCodes":
        """With the rows of `codes` in these slots, ascending; a slot beyond the last writes nothing."""
        return replace(
            self,
            words=scatter(self.words, slots, codes.words),
            ranges=scatter(self.ranges, slots, codes.ranges),
            lower=self.lower if self.lower is None or codes.lower is None else scatter(self.lower, slots, codes.lower),
        )

    @property
    def scale(self) -> Float[Array, "B G P h"]:
        """s of each slot and run."""
        return _scale(self.ranges)

    @property
    def minimum(self) -> Float[Array, "B G P h"]:
        """m of each slot and run."""
        return _minimum(self.ranges)


def _steps(lower: Shaped[Array, "*batch n"], bits: int) -> Float[Array, "*batch n"]:
    """Lower codes in steps of the upper ones: (l - 2^(b - 1)) / 2^b, exact in float32."""
    return (lower.astype(jnp.float32) - 2.0 ** (bits - 1)) * 2.0**-bits


def _ranges(scale: BFloat16[Array, "*batch"], minimum: BFloat16[Array, "*batch"]) -> UInt32[Array, "*batch"]:
    """Both 16-bit numbers in one word, the scale above.

    XLA on CPU scatters no 16-bit floats: it would convert the whole array to 32 bits and back at every write. Out of a
    word, each is a float32 after one mask or shift.
    """
    high, low = (jax.lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32) for half in (scale, minimum))
    return (high << 16) | low


def _scale(ranges: UInt32[Array, "*batch"]) -> Float[Array, "*batch"]:
    return jax.lax.bitcast_convert_type(ranges & jnp.uint32(0xFFFF0000), jnp.float32)


def _minimum(ranges: UInt32[Array, "*batch"]) -> Float[Array, "*batch"]:
    return jax.lax.bitcast_convert_type(ranges << 16, jnp.float32)


def _unpack_slots(words: UInt32[Array, "*batch w P"], bits: int) -> Int[Array, "*batch D P"]:
    """Codes of words whose slots run along the last axis; int32, which a CPU turns into floats faster than unsigned."""
    if bits == 3:
        return jnp.swapaxes(unpack(jnp.swapaxes(words, -1, -2), bits), -1, -2).astype(jnp.int32)
    shifts = bits * jnp.arange(32 // bits, dtype=jnp.int32)[:, None]
    # An arithmetic shift brings in copies of the sign, which the mask takes off again.
    codes = (jax.lax.bitcast_convert_type(words, jnp.int32)[..., None, :] >> shifts) & (2**bits - 1)
    return codes.reshape(*words.shape[:-2], -1, words.shape[-1])


def _not_before(after: Float[Array, "B G"] | None, words: UInt32[Array, "B G *rest"]) -> UInt32[Array, "B G *rest"]:
    """The same words, as if computed from `after`.

    Codes do not depend on the query, so that a compiler may decode those of all layers first and hold them all
    (115 MiB instead of 4 for a small model). An optimization barrier says this, but XLA on CPU drops it before it
    schedules; that no query is infinite is beyond any compiler.
    """
    if after is None:
        return words
    return words + jnp.isinf(after).astype(jnp.uint32).reshape(*after.shape, *[1] * (words.ndim - 2))


def never(numbers: Float[Array, "B G *rest"]) -> Bool[Array, "B G 1"]:
    """False, once these numbers are known, as no compiler can tell: what depends on it comes after them."""
    axes = tuple(range(2, numbers.ndim))
    return jnp.any(jnp.isinf(numbers) & jnp.isnan(numbers), axis=axes)[..., None]
