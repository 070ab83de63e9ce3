"""Tiles of cached numbers for tensor cores on a GPU: rows as they lie, codes taken apart in registers.

A word holds the codes of neighbouring channels, so that one shift over a tile of words (rows of words, slots) gives a
tile of codes, one channel of every word: a "plane". Planes are the operands of the tensor cores; the queries' channels
are loaded, and the output's stored, in the order of the planes. Fewer than 16 word rows are too few for a tensor core:
each is then loaded several times, its copies shifted apart from the start.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kvx.kernels.decode_attention.operands import Operand, Rows
from kvx.kernels.quantize_pack.coded import ChannelCodes

ROWS = 16
"""Least rows, columns and depth of a product on tensor cores."""


@dataclass(frozen=True)
class Layout:
    """How an operand lies, and how its channels come apart into planes.

    Attributes:
        bits: of a code; None: plain rows.
        group: what shares a range.
        by_slot: a range for each slot and run of channels, else for each channel and block of slots.
    """

    width: int
    slots_last: bool = False
    bits: int | None = None
    group: int = 0
    by_slot: bool = False

    @classmethod
    def of(cls, operand: Operand) -> "Layout":
        if isinstance(operand, Rows):
            return cls(operand.width, operand.slots_last)
        return cls(operand.width, True, operand.bits, operand.group, not isinstance(operand, ChannelCodes))

    @property
    def copies(self) -> int:
        """Rows of a tile that are the same word."""
        return 1 if self.bits is None else max(1, ROWS * 32 // (self.width * self.bits))

    @property
    def per_word(self) -> int:
        return 1 if self.bits is None else 32 // self.bits

    @property
    def planes(self) -> int:
        return self.per_word // self.copies

    @property
    def depth(self) -> int:
        """Rows of a tile: channels of a plane."""
        return self.width // self.planes

    def shifts(self) -> jax.Array:
        """Bits that each row of a tile of words is shifted by, so that its copies come apart."""
        return (jnp.arange(self.depth) % self.copies * (self.bits or 0) * self.planes).astype(jnp.uint32)

    def channels(self, plane: int) -> jax.Array:
        """Channel of each row of a plane's tile."""
        row = jax.lax.iota(jnp.int32, self.depth)
        return row * self.planes + plane


def tiles(
    name: str, refs: dict[str, Any], layout: Layout, start: Any, block: int, inside: Any, dtype: Any, packed: bool
) -> Iterator[tuple[jax.Array, bool]]:
    """(tile, turned) of each plane; turned: slots along the last axis."""
    ref = refs[name]
    if layout.bits is None:
        window = (slice(None), pl.ds(start, block)) if layout.slots_last else (pl.ds(start, block), slice(None))
        mask = None if inside is None else (inside[None, :] if layout.slots_last else inside[:, None])
        yield floats(ref, window, mask, dtype), layout.slots_last
        return
    row = jax.lax.iota(jnp.int32, layout.depth)
    mask = None if inside is None else inside[None, :]
    slot = start + jax.lax.iota(jnp.int32, block)

    def by_row(ref, which):
        shape = (layout.depth, block)
        return load(ref, (across(which[:, None], shape), across(slot[None, :], shape)), mask, 0)

    words = by_row(ref, row // layout.copies)
    if layout.copies > 1:
        # Loaded, not computed: only what comes from loads moves to the tensor cores' layout before it is taken apart.
        words = words >> plgpu.load(refs[f"{name}_shifts"].at[row])[:, None]
    if layout.by_slot:
        # All planes of a word share their run of channels: a run is no narrower than a tile row's channels.
        ranges = by_row(refs[f"{name}_ranges"], row * layout.planes // layout.group)
    for plane in range(layout.planes):
        if not layout.by_slot:
            channels = layout.channels(plane)
            blocks = across(start // layout.group, channels.shape)
            ranges = plgpu.load(refs[f"{name}_ranges"].at[blocks, channels])[:, None]
        if packed and layout.bits < 8:
            yield _pairs(words, ranges, layout.bits, plane), True
            continue
        # A code in the highest bits of the mantissa of a 1 makes 1 + c / 2^b without a conversion from integers.
        shift = 23 - layout.bits * (plane + 1)
        moved = words << np.uint32(shift) if shift >= 0 else words >> np.uint32(-shift)
        code = (moved & np.uint32((2**layout.bits - 1) << (23 - layout.bits))) | np.uint32(0x3F800000)
        factor, offset = _affine(ranges, layout.bits)
        yield (jax.lax.bitcast_convert_type(code, jnp.float32) * factor + offset).astype(dtype), True


def _pairs(words, ranges, bits: int, plane: int):
    """A plane of bfloat16 numbers, two slots to an instruction.

    A code of 4 bits is put into the lowest bits of the mantissa of a 128, which makes 128 + c, and 128 is taken off
    again, exactly. One of 2 bits goes into the highest of a 1, which makes 1 + c / 4, and c s + m is that times 4 s
    plus m - 4 s, whose rounding is about that of the result.
    """
    half, offset = divmod(bits * plane, 16)
    lowest = 5 if bits == 2 else 0
    shift = f"shr.b32 t, t, {offset - lowest};" if offset >= lowest else f"shl.b32 t, t, {lowest - offset};"
    mask = ((2**bits - 1) << lowest) * 0x10001
    one = "0x3F803F80" if bits == 2 else "0x43004300"
    affine = (
        """
        mov.b32 k, 0x40804080;
        mov.b32 z, 0x80008000;
        fma.rn.bf16x2 k, s, k, z;
        mov.b32 z, 0xC080C080;
        fma.rn.bf16x2 m, s, z, m;
        fma.rn.bf16x2 $0, t, k, m;"""
        if bits == 2
        else """
        mov.b32 k, 0x3F803F80;
        mov.b32 z, 0xC300C300;
        fma.rn.bf16x2 t, t, k, z;
        fma.rn.bf16x2 $0, t, s, m;"""
    )
    text = f"""{{
        .reg .b32 t, s, m, k, z;
        prmt.b32 t, $1, $2, {0x7632 if half else 0x5410};
        {shift}
        lop3.b32 t, t, {mask:#x}, {one}, 0xEA;
        prmt.b32 s, $3, $4, 0x7632;
        prmt.b32 m, $3, $4, 0x5410;{affine}
    }}"""
    [numbers] = plgpu.elementwise_inline_asm(
        text,
        args=[words, across(ranges, words.shape)],
        constraints="=r,r,r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
    )
    return numbers


def _affine(ranges, bits: int):
    """Factor and offset that turn 1 + c / 2^b into c * s + m."""
    scale = jax.lax.bitcast_convert_type(ranges & np.uint32(0xFFFF0000), jnp.float32) * np.float32(2**bits)
    return scale, jax.lax.bitcast_convert_type(ranges << np.uint32(16), jnp.float32) - scale


def gather(ref, rows, columns, mask, dtype):
    """A tile of any rows and columns; zeros where not `mask`."""
    shape = (rows.shape[0], columns.shape[0])
    index = (across(rows[:, None], shape), across(columns[None, :], shape))
    return plgpu.load(ref.at[index], mask=across(mask, shape), other=0).astype(dtype)


def floats(ref, index, mask, dtype):
    """Rows in the dtype of the product, zeros where not `mask`; 8-bit floats have no constants to load instead."""
    if mask is None or ref.dtype != jnp.float8_e4m3fn:
        return load(ref, index, mask, 0).astype(dtype)
    rows = plgpu.load(ref.at[index], mask=mask).astype(dtype)
    return jnp.where(mask, rows, jnp.zeros_like(rows))


def load(ref, index, mask, other):
    if mask is None:
        return plgpu.load(ref.at[index])
    shape = index[0].shape if hasattr(index[0], "shape") else mask.shape
    return plgpu.load(ref.at[index], mask=across(mask, shape), other=other)


def dot(a, b, turned: bool):
    """Rows of a by columns of b (rows if `turned`), accumulated in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def across(array, shape):
    return jnp.broadcast_to(array, shape)
