"""Quantize and pack on a TPU: a block of slots is coded, turned and packed in VMEM; words leave with slots along lanes.

Groups run down the sublanes: along channels the block is turned before it is coded, along slots after. The codes of a
word then lie below each other and are picked out by strided reads.
"""

from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt32

from kvx.kernels.implementations import LANES
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes, range_minimum, range_scale
from kvx.kernels.quantize_pack.uniform_codes import ROUNDING


@dataclass(frozen=True)
class Tuning:
    """Slots a step, a multiple of 128; groups along slots may ask for more."""

    slots: int = 1024


CANDIDATES = tuple(Tuning(slots) for slots in (512, 1024, 2048))


def refusal(channels: int, slots: int, bits: int, group: int, along: str, tuning: Any) -> str | None:
    """Why these arguments cannot run."""
    if tuning is not None and (not isinstance(tuning, Tuning) or tuning.slots % 128):
        return f"tuning is {tuning}, it takes its own Tuning with slots a multiple of 128"
    if group % 8:
        return f"group is {group}, it takes multiples of 8"
    words = channels * bits // 32
    if words > 8 and words % 8:
        return f"a slot has {words} words, it takes up to 8 or multiples of 8: others XLA copies into padded tiles"
    if channels % 32:
        return f"rows have {channels} channels, it takes multiples of 32"
    return None


def quantize_pack(
    rows: Float[Array, "B G m n"],
    *,
    bits: int,
    group: int,
    along: Literal["channels", "slots"],
    slots_last: bool,
    tuning: Tuning | None = None,
) -> ChannelCodes | TokenCodes:
    """See `kvx.kernels.quantize_pack.quantize_pack`."""
    lead = rows.shape[:2]
    flat = rows.reshape(-1, *rows.shape[2:])
    channels, slots = flat.shape[1:] if slots_last else flat.shape[:0:-1]
    block = _block(slots, group, along, tuning)
    count = channels * bits // 32
    ranges, ranges_spec = _ranges(flat.shape[0], channels, slots, group, along, block)
    words, found = pl.pallas_call(
        partial(_quantize_kernel, bits=bits, group=group, along=along, slots_last=slots_last),
        grid=(flat.shape[0], pl.cdiv(slots, block)),
        in_specs=[_rows_spec(channels, block, slots_last)],
        out_specs=[pl.BlockSpec((None, count, block), lambda b, j: (b, 0, j)), ranges_spec],
        out_shape=[jax.ShapeDtypeStruct((flat.shape[0], count, slots), jnp.uint32), ranges],
        scratch_shapes=_scratch(channels, bits, block),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="quantize_pack",
    )(flat)
    kind = ChannelCodes if along == "slots" else TokenCodes
    return kind(words.reshape(*lead, *words.shape[1:]), found.reshape(*lead, *found.shape[1:]), bits)


def unpack_dequantize(
    codes: ChannelCodes | TokenCodes, *, dtype: jnp.dtype, slots_last: bool, tuning: Tuning | None = None
) -> Float[Array, "B G m n"]:
    """See `kvx.kernels.quantize_pack.unpack_dequantize`."""
    along: Literal["channels", "slots"] = "slots" if isinstance(codes, ChannelCodes) else "channels"
    lead = codes.words.shape[:2]
    words, ranges = (array.reshape(-1, *array.shape[2:]) for array in (codes.words, codes.ranges))
    channels, slots = codes.width, codes.slots
    block = _block(slots, codes.group, along, tuning)
    _, ranges_spec = _ranges(words.shape[0], channels, slots, codes.group, along, block)
    scratch = _scratch(channels, codes.bits, block)
    if isinstance(codes, ChannelCodes) and codes.groups_last:
        # As memory holds them; a tile of groups stays while blocks of slots take theirs out of it.
        ranges, groups = jnp.swapaxes(ranges, 1, 2), block // codes.group
        ranges_spec = pl.BlockSpec((None, channels, LANES), lambda b, j: (b, 0, jax.lax.div(j * groups, LANES)))
        scratch.append(pltpu.VMEM((LANES, channels), jnp.uint32))
    shape = (words.shape[0], channels, slots) if slots_last else (words.shape[0], slots, channels)
    rows = pl.pallas_call(
        partial(_unpack_kernel, bits=codes.bits, group=codes.group, along=along, slots_last=slots_last),
        grid=(words.shape[0], pl.cdiv(slots, block)),
        in_specs=[pl.BlockSpec((None, words.shape[1], block), lambda b, j: (b, 0, j)), ranges_spec],
        out_specs=_rows_spec(channels, block, slots_last),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="unpack_dequantize",
    )(words, ranges)
    return rows.reshape(*lead, *shape[1:])


def _block(slots: int, group: int, along: str, tuning: Tuning | None) -> int:
    """Slots a step: whole runs of lanes and, along slots, eight whole groups, which divide a tile of 128."""
    unit = LANES if along == "channels" else lcm(LANES, 8 * group)
    wanted = min((tuning or Tuning()).slots, slots)
    units = -(-wanted // unit)
    if along == "slots":
        units = 1 << (min(units, LANES * group // unit).bit_length() - 1)
    return units * unit


def _rows_spec(channels: int, block: int, slots_last: bool) -> pl.BlockSpec:
    if slots_last:
        return pl.BlockSpec((None, channels, block), lambda b, j: (b, 0, j))
    return pl.BlockSpec((None, block, channels), lambda b, j: (b, j, 0))


def _ranges(
    count: int, channels: int, slots: int, group: int, along: str, block: int
) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    """Shape and blocks of the ranges."""
    if along == "channels":
        shape = (count, channels // group, slots)
        spec = pl.BlockSpec((None, channels // group, block), lambda b, j: (b, 0, j))
    else:
        shape = (count, slots // group, channels)
        spec = pl.BlockSpec((None, block // group, channels), lambda b, j: (b, j, 0))
    return jax.ShapeDtypeStruct(shape, jnp.uint32), spec


def _scratch(channels: int, bits: int, block: int) -> list[Any]:
    """Codes and words by runs of 128 slots: strided access is to whole registers of lanes."""
    runs = block // LANES
    return [
        pltpu.VMEM((runs, channels, LANES), jnp.int32),
        pltpu.VMEM((runs, channels * bits // 32, LANES), jnp.uint32),
    ]


def _quantize_kernel(rows_ref, words_ref, ranges_ref, codes_ref, packed_ref, *, bits, group, along, slots_last):
    rows = rows_ref[...].astype(jnp.float32)
    turn = slots_last == (along == "slots")
    rows = rows.T if turn else rows
    groups = rows.reshape(-1, group, rows.shape[1])
    low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)
    # As in `uniform_codes.quantize`: the range that is stored, of which the codes are taken.
    minimum = (low - jnp.abs(low) * ROUNDING).astype(jnp.bfloat16).astype(jnp.float32)
    spread = high - minimum
    scale = jnp.where(spread > 0, spread * (1 + ROUNDING) / (2**bits - 1), 1.0)
    scale = scale.astype(jnp.bfloat16).astype(jnp.float32)
    ranges_ref[...] = _bits(scale) | (_bits(minimum) >> 16)
    steps = jnp.round((groups - minimum[:, None]) / scale[:, None])
    codes = jnp.clip(steps, 0, 2**bits - 1).reshape(rows.shape)
    codes = (codes.T if along == "slots" else codes).astype(jnp.int32)
    for run in range(codes_ref.shape[0]):
        lanes = slice(run * LANES, (run + 1) * LANES)
        codes_ref[run] = codes[:, lanes]
        _pack(codes_ref.at[run], packed_ref.at[run], bits)
        words_ref[:, lanes] = packed_ref[run]


def _unpack_kernel(words_ref, ranges_ref, rows_ref, codes_ref, packed_ref, *tile, bits, group, along, slots_last):
    for run in range(codes_ref.shape[0]):
        packed_ref[run] = words_ref[:, run * LANES : (run + 1) * LANES]
        _unpack(packed_ref.at[run], codes_ref.at[run], bits)
    codes = jnp.concatenate([codes_ref[run] for run in range(codes_ref.shape[0])], axis=1).astype(jnp.float32)
    codes = codes.T if along == "slots" else codes
    ranges = ranges_ref[...]
    if tile:
        own = codes.shape[0] // group
        tile[0][...] = ranges.T
        ranges = tile[0][pl.ds(jax.lax.rem(pl.program_id(1) * own, LANES), own), :]
    scale, minimum = range_scale(ranges), range_minimum(ranges)
    groups = codes.reshape(-1, group, codes.shape[1]) * scale[:, None] + minimum[:, None]
    rows = groups.reshape(codes.shape)
    turn = slots_last == (along == "slots")
    rows_ref[...] = (rows.T if turn else rows).astype(rows_ref.dtype)


def _bits(x: Float[Array, "*batch"]) -> UInt32[Array, "*batch"]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _atom(bits: int) -> tuple[int, int]:
    """Codes that fill whole words, the fewest of them, and those words."""
    return (32, 3) if bits == 3 else (32 // bits, 1)


def _pack(codes_ref, words_ref, bits: int) -> None:
    """Codes (D, P) to words (w, P)."""
    codes, words = _atom(bits)
    atoms = codes_ref.shape[0] // codes
    packed = [jnp.zeros((atoms, codes_ref.shape[1]), jnp.int32) for _ in range(words)]
    for index in range(codes):
        code = codes_ref[pl.ds(index, atoms, stride=codes), :]
        word, shift = divmod(index * bits, 32)
        packed[word] |= code << shift
        if shift + bits > 32:
            packed[word + 1] |= code >> (32 - shift)
    for index, word in enumerate(packed):
        words_ref[pl.ds(index, atoms, stride=words), :] = jax.lax.bitcast_convert_type(word, jnp.uint32)


def _unpack(words_ref, codes_ref, bits: int) -> None:
    """Words (w, P) to codes (D, P)."""
    codes, words = _atom(bits)
    atoms = codes_ref.shape[0] // codes
    packed = [words_ref[pl.ds(index, atoms, stride=words), :] for index in range(words)]
    for index in range(codes):
        word, shift = divmod(index * bits, 32)
        code = packed[word] >> shift
        if shift + bits > 32:
            code |= packed[word + 1] << (32 - shift)
        codes_ref[pl.ds(index, atoms, stride=codes), :] = (code & (2**bits - 1)).astype(jnp.int32)
