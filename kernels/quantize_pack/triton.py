"""Quantize and pack on a GPU: a program codes a few slots in registers; a word is the sum of its shifted codes."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, UInt32

from kvx.kernels.checks import triton_refusal
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes, range_minimum, range_scale
from kvx.kernels.quantize_pack.uniform_codes import ROUNDING


@dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        slots: slots a program, a power of two; quantizing along slots it is the group.
        warps: of Triton.
        interpret: run without a GPU, for tests.
    """

    slots: int = 64
    warps: int = 4
    interpret: bool = False


CANDIDATES = tuple(Tuning(slots, warps) for slots in (16, 32, 64, 128) for warps in (4, 8))


def refusal(channels: int, slots: int, bits: int, group: int, along: str, tuning: Any) -> str | None:
    """Why these arguments cannot run."""
    if tuning is not None and not isinstance(tuning, Tuning):
        return f"tuning is {tuning}, it takes its own Tuning"
    if reason := triton_refusal(interpreted=tuning is not None and tuning.interpret):
        return reason
    for name, size in (
        ("rows have channels", channels),
        ("group", group),
        ("tuning.slots", (tuning or Tuning()).slots),
    ):
        if size & (size - 1):
            return f"{name}: {size}, it takes powers of two"
    if channels % 32:
        return f"rows have {channels} channels, it takes multiples of 32"
    if along == "slots" and group > 512:
        return f"group is {group}, it takes at most 512 along slots, which a program holds at once"
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
    tuning, lead = tuning or Tuning(), rows.shape[:2]
    flat = rows.reshape(-1, *rows.shape[2:])
    channels, slots = flat.shape[1:] if slots_last else flat.shape[:0:-1]
    block = group if along == "slots" else tuning.slots
    ranges = (slots // group, channels) if along == "slots" else (channels // group, slots)
    words, found = pl.pallas_call(
        partial(_quantize_kernel, bits=bits, group=group, along=along, slots_last=slots_last, block=block),
        grid=(pl.cdiv(slots, block), flat.shape[0]),
        out_shape=[
            jax.ShapeDtypeStruct((flat.shape[0], channels * bits // 32, slots), jnp.uint32),
            jax.ShapeDtypeStruct((flat.shape[0], *ranges), jnp.uint32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=tuning.interpret,
        name="quantize_pack",
    )(flat)
    kind = ChannelCodes if along == "slots" else TokenCodes
    return kind(words.reshape(*lead, *words.shape[1:]), found.reshape(*lead, *ranges), bits)


def unpack_dequantize(
    codes: ChannelCodes | TokenCodes, *, dtype: jnp.dtype, slots_last: bool, tuning: Tuning | None = None
) -> Float[Array, "B G m n"]:
    """See `kvx.kernels.quantize_pack.unpack_dequantize`."""
    tuning, lead = tuning or Tuning(), codes.words.shape[:2]
    words, ranges = (array.reshape(-1, *array.shape[2:]) for array in (codes.words, codes.ranges))
    shape = (codes.width, codes.slots) if slots_last else (codes.slots, codes.width)
    rows = pl.pallas_call(
        partial(
            _unpack_kernel,
            bits=codes.bits,
            group=codes.group,
            along="slots" if isinstance(codes, ChannelCodes) else "channels",
            slots_last=slots_last,
            block=tuning.slots,
        ),
        grid=(pl.cdiv(codes.slots, tuning.slots), words.shape[0]),
        out_shape=jax.ShapeDtypeStruct((words.shape[0], *shape), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=tuning.interpret,
        name="unpack_dequantize",
    )(words, ranges)
    return rows.reshape(*lead, *shape)


def _tile(slots, channels, slots_last):
    """Index of a tile of rows, one slot to a line."""
    return (channels[None, :], slots[:, None]) if slots_last else (slots[:, None], channels[None, :])


def _quantize_kernel(rows_ref, words_ref, ranges_ref, *, bits, group, along, slots_last, block):
    row, step = pl.program_id(1), pl.program_id(0)
    count, channels = words_ref.shape[2], words_ref.shape[1] * 32 // bits
    slots, index = step * block + jnp.arange(block), jnp.arange(channels)
    kept = slots < count
    where = _tile(slots, index, slots_last)
    tile = plgpu.load(rows_ref.at[row, *where], mask=kept[:, None], other=0).astype(jnp.float32)
    if along == "slots":
        scale, minimum = _range(jnp.min(tile, axis=0), jnp.max(tile, axis=0), bits)
        plgpu.store(ranges_ref.at[row, step, index], _bits(scale) | (_bits(minimum) >> 16))
        steps = (tile - minimum[None, :]) / scale[None, :]
    else:
        groups = tile.reshape(block, channels // group, group)
        scale, minimum = _range(jnp.min(groups, axis=2), jnp.max(groups, axis=2), bits)
        where = ranges_ref.at[row, jnp.arange(channels // group)[None, :], slots[:, None]]
        plgpu.store(where, _bits(scale) | (_bits(minimum) >> 16), mask=kept[:, None])
        steps = ((groups - minimum[:, :, None]) / scale[:, :, None]).reshape(block, channels)
    codes = jnp.clip(_nearest(steps), 0.0, 2.0**bits - 1).astype(jnp.int32)
    # 32 codes fill 3 words of 3-bit codes, with some across two; of other widths, a word holds whole codes.
    per_atom, words = (32, 3) if bits == 3 else (32 // bits, 1)
    atoms = channels // per_atom
    codes = codes.reshape(block, atoms, per_atom)
    for word in range(words):
        shift = (bits * jnp.arange(per_atom) - 32 * word)[None, None, :]
        left = jnp.where((shift >= 0) & (shift < 32), codes << jnp.clip(shift, 0, 31), 0)
        right = jnp.where((shift < 0) & (shift > -bits), codes >> jnp.clip(-shift, 0, 31), 0)
        packed = jax.lax.bitcast_convert_type(jnp.sum(left | right, axis=2), jnp.uint32)
        where = words_ref.at[row, (jnp.arange(atoms) * words + word)[None, :], slots[:, None]]
        plgpu.store(where, packed, mask=kept[:, None])


def _nearest(x):
    """To the nearest whole number, ties to even, as everywhere else: Triton has no rounding of its own."""
    below = jnp.floor(x)
    above, odd = x - below, below - 2 * jnp.floor(below / 2)
    return below + jnp.where(above == 0.5, odd, (above > 0.5).astype(jnp.float32))


def _range(low, high, bits):
    """As in `uniform_codes.quantize`: the range that is stored, of which the codes are taken."""
    minimum = (low - jnp.abs(low) * ROUNDING).astype(jnp.bfloat16).astype(jnp.float32)
    spread = high - minimum
    scale = jnp.where(spread > 0, spread * (1 + ROUNDING) / (2**bits - 1), 1.0)
    return scale.astype(jnp.bfloat16).astype(jnp.float32), minimum


def _bits(x: Float[Array, "*batch"]) -> UInt32[Array, "*batch"]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _unpack_kernel(words_ref, ranges_ref, rows_ref, *, bits, group, along, slots_last, block):
    row, count = pl.program_id(1), words_ref.shape[2]
    slots, index = pl.program_id(0) * block + jnp.arange(block), jnp.arange(words_ref.shape[1] * 32 // bits)
    kept = (slots < count)[:, None]

    # Every code reads its own word: neighbours read the same one, from a cache.
    def word(at, mask):
        return plgpu.load(words_ref.at[row, at[None, :], slots[:, None]], mask=mask, other=0)

    first, shift = index * bits // 32, index * bits % 32
    codes = word(first, kept) >> shift.astype(jnp.uint32)[None, :]
    if bits == 3:
        across = (shift + bits > 32)[None, :]
        rest = word(jnp.minimum(first + 1, words_ref.shape[1] - 1), kept & across)
        codes |= rest << jnp.where(across, 32 - shift[None, :], 0).astype(jnp.uint32)
    codes = (codes & (2**bits - 1)).astype(jnp.int32).astype(jnp.float32)
    group_of = (
        (slots[:, None] // group, index[None, :]) if along == "slots" else (index[None, :] // group, slots[:, None])
    )
    ranges = plgpu.load(ranges_ref.at[row, *group_of], mask=kept, other=0)
    rows = codes * range_scale(ranges) + range_minimum(ranges)
    where = rows_ref.at[row, *_tile(slots, index, slots_last)]
    plgpu.store(where, rows.astype(rows_ref.dtype), mask=kept)
