"""Arrays of low-bit codes by slot, as attention reads them: grouped along slots (keys) or along channels (values).

Slots run along the last axis of the words: a CPU then decodes whole stretches of memory with one range, a TPU stores
them without padding its lanes, and the threads of a GPU load neighbouring words.

Codes may be nested (Tiwari et al. 2025, "QuantSpec"): what the upper code leaves is coded once more, in as many bits,
on the same range, and lies in an array of its own. Read alone, the upper codes are an ordinary code of b bits; with the
lower ones, one of 2b.
"""

from dataclasses import field

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, Shaped, UInt32

from kvx.kernels.implementations import LANES
from kvx.kernels.pytree import pytree
from kvx.kernels.quantize_pack.uniform_codes import pack, quantize, quantize_residual, unpack


@pytree
class ChannelCodes:
    """One range for each channel and block of n slots (KIVI's keys).

    Keys have channels that are large for every token; so grouped, such a channel spoils only its own groups.

    Attributes:
        words: codes of a slot's channels, w words to a slot, little-end.
        ranges: scale and minimum of each of M blocks and each channel, see `joined_ranges`.
        bits: width of a code.
        lower: codes of what `words` leave, laid out alike; None: not nested.
    """

    words: UInt32[Array, "B G w P"]
    ranges: UInt32[Array, "B G M D"]
    bits: int = field(metadata={"static": True})
    lower: UInt32[Array, "B G w P"] | None = None

    @property
    def groups_last(self) -> bool:
        """Whether a TPU holds the ranges turned about: what fills its lanes is the groups, not the channels."""
        return self.ranges.shape[3] % LANES != 0 and self.ranges.shape[2] >= LANES

    @classmethod
    def encode(cls, rows: Float[Array, "B G P D"], bits: int, group: int, nested: bool = False) -> "ChannelCodes":
        """Rows in blocks of `group`, which divides their number."""
        channels = jnp.swapaxes(rows, -1, -2)
        blocks = channels.reshape(*channels.shape[:3], -1, group)
        codes, scale, minimum = quantize(blocks, bits)
        lower = None
        if nested:
            left = quantize_residual(blocks, codes, scale, minimum, bits)
            lower = _pack_slots(left.reshape(channels.shape), bits)
        ranges = jnp.swapaxes(joined_ranges(scale, minimum), -1, -2)
        return cls(_pack_slots(codes.reshape(channels.shape), bits), ranges, bits, lower)

    def decode(self, after: Float[Array, "B G"] | None = None, upper: bool = False) -> Float[Array, "B G D P"]:
        """c * s + m, float32, slots along the last axis as they lie; not before `after` is known.

        Args:
            after: any numbers that depend on the query.
            upper: without what is in `lower`.
        """
        ranges = jnp.swapaxes(self.ranges, -1, -2)[..., None]
        codes = _codes(self, after, upper)
        blocks = codes.reshape(*ranges.shape[:-1], self.group)
        return (blocks * range_scale(ranges) + range_minimum(ranges)).reshape(codes.shape)

    @property
    def slots(self) -> int:
        """P."""
        return self.words.shape[-1]

    @property
    def width(self) -> int:
        """D, the channels of a slot."""
        return self.ranges.shape[-1]

    @property
    def group(self) -> int:
        """Slots that share a range."""
        return self.words.shape[-1] // self.ranges.shape[-2]

    @property
    def scale(self) -> Float[Array, "B G M D"]:
        """s of each block and channel."""
        return range_scale(self.ranges)

    @property
    def minimum(self) -> Float[Array, "B G M D"]:
        """m of each block and channel."""
        return range_minimum(self.ranges)


@pytree
class TokenCodes:
    """One range for each slot and run of n channels (KIVI's values).

    Attributes:
        words: codes of a slot's channels, w words to a slot, little-end.
        ranges: scale and minimum of each of h runs and each slot, see `joined_ranges`.
        bits: width of a code.
        lower: codes of what `words` leave, laid out alike; None: not nested.
    """

    words: UInt32[Array, "B G w P"]
    ranges: UInt32[Array, "B G h P"]
    bits: int = field(metadata={"static": True})
    lower: UInt32[Array, "B G w P"] | None = None

    @classmethod
    def encode(cls, rows: Float[Array, "B G P V"], bits: int, group: int, nested: bool = False) -> "TokenCodes":
        """Rows in runs of `group` channels, which divides their width."""
        runs = rows.reshape(*rows.shape[:3], -1, group)
        codes, scale, minimum = quantize(runs, bits)

        def packed(codes):
            return jnp.swapaxes(pack(codes.reshape(rows.shape), bits), -1, -2)

        lower = packed(quantize_residual(runs, codes, scale, minimum, bits)) if nested else None
        return cls(packed(codes), jnp.swapaxes(joined_ranges(scale, minimum), -1, -2), bits, lower)

    def decode(self, after: Float[Array, "B G"] | None = None, upper: bool = False) -> Float[Array, "B G V P"]:
        """c * s + m, float32, slots along the last axis as they lie; not before `after` is known.

        Args:
            after: any numbers that depend on the query.
            upper: without what is in `lower`.
        """
        codes = _codes(self, after, upper)
        *lead, runs, slots = self.ranges.shape
        by_run = codes.reshape(*lead, runs, -1, slots)
        return (by_run * self.scale[..., None, :] + self.minimum[..., None, :]).reshape(codes.shape)

    @property
    def slots(self) -> int:
        """P."""
        return self.words.shape[-1]

    @property
    def width(self) -> int:
        """V, the channels of a slot."""
        return self.words.shape[-2] * 32 // self.bits

    @property
    def group(self) -> int:
        """Channels that share a range."""
        return self.width // self.ranges.shape[-2]

    @property
    def scale(self) -> Float[Array, "B G h P"]:
        """s of each run and slot."""
        return range_scale(self.ranges)

    @property
    def minimum(self) -> Float[Array, "B G h P"]:
        """m of each run and slot."""
        return range_minimum(self.ranges)


def joined_ranges(scale: BFloat16[Array, "*batch"], minimum: BFloat16[Array, "*batch"]) -> UInt32[Array, "*batch"]:
    """Both 16-bit numbers in one word, the scale above.

    XLA on CPU scatters no 16-bit floats: it would convert the whole array to 32 bits and back at every write. Out of a
    word, each is a float32 after one mask or shift.
    """
    high, low = (jax.lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32) for half in (scale, minimum))
    return (high << 16) | low


def range_scale(ranges: UInt32[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The scale in a word of `joined_ranges`, float32."""
    return jax.lax.bitcast_convert_type(ranges & jnp.uint32(0xFFFF0000), jnp.float32)


def range_minimum(ranges: UInt32[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The minimum in a word of `joined_ranges`, float32."""
    return jax.lax.bitcast_convert_type(ranges << 16, jnp.float32)


def _codes(coded: ChannelCodes | TokenCodes, after: Float[Array, "B G"] | None, upper: bool) -> Float[Array, "B G D P"]:
    """Codes in steps of the upper ones, float32."""
    codes = _unpack_slots(_not_before(after, coded.words), coded.bits).astype(jnp.float32)
    if coded.lower is None or upper:
        return codes
    below = _unpack_slots(_not_before(after, coded.lower), coded.bits).astype(jnp.float32)
    # (l - 2^(b - 1)) / 2^b is exact in float32.
    return codes + (below - 2.0 ** (coded.bits - 1)) * 2.0**-coded.bits


def _pack_slots(codes: Shaped[Array, "*batch D P"], bits: int) -> UInt32[Array, "*batch w P"]:
    """Words of codes whose slots run along the last axis."""
    return jnp.swapaxes(pack(jnp.swapaxes(codes, -1, -2), bits), -1, -2)


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
