"""Decode attention on TPUs by Pallas: how a call is cut into blocks of slots, which stream through VMEM.

So many query rows that their sums and outputs do not fit beside a block are cut as well: each part reads the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvx.kernels.checks import dtype_refusal
from kvx.kernels.decode_attention.call import Call, Found, with_tail_logits
from kvx.kernels.decode_attention.mosaic_tpu_kernel import Facts, kernel, range_tile
from kvx.kernels.decode_attention.operands import Operand, Rows
from kvx.kernels.implementations import LANES
from kvx.kernels.merge_partials import Partial
from kvx.kernels.quantize_pack.coded import ChannelCodes

SUBLANES = 8


@dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        block: slots of one grid step, rounded to what the operands' tiles ask for; None: by bytes.
    """

    block: int | None = None


CANDIDATES = (Tuning(512), Tuning(1024), Tuning(2048))
"""What a benchmark tries."""

BLOCK_BYTES = 2**21
"""Of keys and values together; two blocks are in flight."""

VMEM_BYTES = 15 * 2**20
"""What a kernel may plan with: a v5e gives it 16 MiB, of which the compiler takes some for itself."""


def refusal(call: Call) -> str | None:
    """Why the kernel cannot take the call; None if it can."""
    if reason := dtype_refusal({"queries": call.queries.dtype}):
        return reason
    for name, operand in (("keys", call.keys), ("values", call.values)):
        if reason := _operand_refusal(name, operand):
            return reason
    share = _share(call)
    block, least = _block(call, share, None), _row_unit(call)
    if (needed := _vmem(call, share, block, min(least, call.queries.shape[2]))) > VMEM_BYTES:
        return f"a block of {share} KV heads asks for {needed} bytes of VMEM, the kernel has {VMEM_BYTES}"
    return None


def _operand_refusal(name: str, operand: Operand) -> str | None:
    if isinstance(operand, Rows):
        if operand.width % LANES and not operand.slots_last:
            return (
                f"{name} has rows of {operand.width} channels along the lanes, the kernel takes multiples of {LANES}, "
                "or rows with slots_last=True"
            )
        return dtype_refusal({name: operand.array.dtype}, (jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn))
    if operand.bits not in (2, 4, 8) or operand.lower is not None:
        kind = "nested codes" if operand.lower is not None else f"codes of {operand.bits} bits"
        return f"{name} has {kind}, the kernel takes plain ones of 2, 4 or 8"
    if operand.group % 32:
        return f"{name} has groups of {operand.group}, the kernel takes multiples of 32"
    return None


def attend(call: Call, tuning: Tuning | None = None) -> Found:
    """A grid over rows of the batch, heads, query rows and slots; blocks behind the longest head are not fetched."""
    batch, heads, rows, dim = call.queries.shape
    slots, width = call.keys.slots, call.values.width
    share = _share(call)
    block = _block(call, share, (tuning or Tuning()).block)
    part_rows = _rows(call, share, block)
    blocks = pl.cdiv(slots, block)
    lengths = jnp.full((batch, heads), slots, jnp.int32) if call.lengths is None else call.lengths.astype(jnp.int32)
    ends = jnp.max(pl.cdiv(lengths.reshape(batch, -1, share), block), axis=-1)
    inputs, specs = _inputs(call, share, block, part_rows)
    facts = Facts.of(call, share, block, _heads_within(call))
    # Logits with the T queries of a head apart, as the caller will show them: put apart later, they would be copied.
    apart = (rows // call.length, call.length, slots)
    shapes = {"out": (rows, width), "lse": (rows, 1)} | ({"logits": apart} if call.logits else {})
    found = pl.pallas_call(
        partial(kernel, call=facts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // share, pl.cdiv(rows, part_rows), blocks),
            in_specs=[specs],
            out_specs={
                name: pl.BlockSpec(
                    (1, share, part_rows // call.length, call.length, block),
                    lambda row, head, part, at, *_: (row, head, part, 0, at),
                )
                if name == "logits"
                else _by_row(share, part_rows, shape[1])
                for name, shape in shapes.items()
            },
            scratch_shapes=[
                pltpu.VMEM((share, part_rows, LANES), jnp.float32),
                pltpu.VMEM((share, part_rows, LANES), jnp.float32),
                pltpu.VMEM((share, part_rows, width), jnp.float32),
                *([pltpu.VMEM((share, facts.range_tile, dim), jnp.uint32)] if facts.range_tile else []),
            ],
        ),
        out_shape={name: jax.ShapeDtypeStruct((batch, heads, *shape), jnp.float32) for name, shape in shapes.items()},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        name="decode_attention",
    )(ends, lengths, inputs)
    part = Partial(found["out"], found["lse"][..., 0])
    if not call.logits:
        return part, None
    return part, with_tail_logits(call, found["logits"].reshape(batch, heads, rows, slots))


def _share(call: Call) -> int:
    """KV heads of a block: positions lie heads by slots, so that they fill whole tiles of sublanes, or are all."""
    heads = call.queries.shape[1]
    return SUBLANES if heads % SUBLANES == 0 else heads


def _row_unit(call: Call) -> int:
    """Query rows are cut at multiples of this: whole tiles, and for logits all T queries of a head."""
    return lcm(2 * SUBLANES, call.length if call.logits else 1)


def _rows(call: Call, share: int, block: int) -> int:
    """Query rows of a grid step: all, or the most that fit in as many equal parts as it takes."""
    rows, unit = call.queries.shape[2], _row_unit(call)
    parts = 1
    while (part := min(pl.cdiv(pl.cdiv(rows, parts), unit) * unit, rows)) > unit:
        if _vmem(call, share, block, part) <= VMEM_BYTES:
            break
        parts += 1
    return part


def _vmem(call: Call, share: int, block: int, rows: int) -> int:
    """Bytes on the chip for so many query rows: what the compiler reports, or up to a quarter more."""
    batch, heads, all_rows, dim = call.queries.shape
    lanes = [pl.cdiv(width, LANES) * LANES for width in (dim, call.values.width)]
    rows = pl.cdiv(rows, SUBLANES) * SUBLANES
    sums = 4 * share * rows * (2 * LANES + lanes[1])
    each = share * rows * (call.queries.dtype.itemsize * lanes[0] + 4 * (lanes[1] + LANES)) + 4 * rows * LANES
    if call.logits:
        each += 4 * share * rows // call.length * pl.cdiv(call.length, SUBLANES) * SUBLANES * block
    # A block that never changes needs no second one to be fetched meanwhile.
    buffers = 1 if batch * heads == share and rows >= all_rows and not call.logits else 2
    tail = 0 if call.tail is None else 2 * share * call.tail.keys.shape[2] * sum(lanes) * call.tail.keys.dtype.itemsize
    return sums + buffers * each + tail + 2 * block * _bytes_per_slot(call, share) + 4 * rows * block


def _bytes_per_slot(call: Call, share: int) -> int:
    arrays = [operand.array if isinstance(operand, Rows) else operand.words for operand in (call.keys, call.values)]
    return sum(share * array.shape[2] * array.shape[3] * array.dtype.itemsize for array in arrays) // call.keys.slots


def _block(call: Call, share: int, wanted: int | None) -> int:
    """Slots of a grid step: whole tiles of every operand, or all slots."""
    bytes_per_slot, unit = _bytes_per_slot(call, share), LANES
    for operand in (call.keys, call.values):
        if isinstance(operand, ChannelCodes):
            unit = lcm(unit, operand.group * SUBLANES)
    limit = 2048 if isinstance(call.keys, Rows) else 1024
    block = wanted or min(max(BLOCK_BYTES // bytes_per_slot, unit), limit)
    units = max(block // unit, 1)
    if isinstance(call.keys, ChannelCodes) and call.keys.groups_last:
        # Blocks divide a tile of ranges.
        units = 1 << (min(units, LANES * call.keys.group // unit).bit_length() - 1)
    return min(units * unit, call.keys.slots)


def _inputs(call: Call, share: int, block: int, part_rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays of a call by name, and their blocks."""
    along_last = partial(_streamed, share, block, True)
    arrays, specs = {"queries": call.queries}, {"queries": _by_row(share, part_rows, call.queries.shape[3])}

    def put(name, array, spec):
        arrays[name], specs[name] = array, spec

    for name, operand in (("keys", call.keys), ("values", call.values)):
        if isinstance(operand, Rows):
            put(name, operand.array, _streamed(share, block, operand.slots_last, operand.width))
            if operand.scale is not None and operand.scale.shape[-1] == operand.slots:
                put(f"{name}_scale", operand.scale, along_last(1))
            elif operand.scale is not None:
                put(f"{name}_scale", operand.scale, _whole(share, (1, 1)))
        else:
            put(name, operand.words, along_last(operand.words.shape[2]))
            if isinstance(operand, ChannelCodes) and operand.groups_last:
                put(f"{name}_ranges", jnp.swapaxes(operand.ranges, 2, 3), _tiles_of_ranges(share, block, operand))
            elif isinstance(operand, ChannelCodes):
                group = block // operand.group if block % operand.group == 0 else operand.ranges.shape[2]
                put(f"{name}_ranges", operand.ranges, _streamed(share, group, False, operand.width))
            else:
                put(f"{name}_ranges", operand.ranges, along_last(operand.ranges.shape[2]))
    for name, array in (("slots", call.slots), ("bias", call.bias)):
        if array is not None:
            put(name, array, along_last(None))
    if call.tail is not None:
        put("tail_positions", call.tail.positions, _whole(share, call.tail.positions.shape[2:]))
        for name in ("keys", "values"):
            array = getattr(call.tail, name)
            if _heads_within(call):
                array = jnp.swapaxes(array, 1, 2)
                entries, width = array.shape[1], array.shape[3]
                put(
                    f"tail_{name}",
                    array,
                    pl.BlockSpec((1, entries, share, width), lambda row, head, *_: (row, 0, head, 0)),
                )
            else:
                put(f"tail_{name}", array, _whole(share, array.shape[2:]))
    if call.row_positions is not None:
        rows = call.row_positions[..., None]
        put("positions", rows, pl.BlockSpec((1, part_rows, 1), lambda row, head, part, *_: (row, part, 0)))
    return arrays, specs


def _heads_within(call: Call) -> bool:
    """Whether XLA lays a tail with the heads inside its entries, because the entries do not fill whole tiles."""
    if call.tail is None:
        return False
    entries, heads = call.tail.keys.shape[2], call.queries.shape[1]
    return entries % SUBLANES != 0 and heads % SUBLANES == 0


def _tiles_of_ranges(share: int, block: int, keys: ChannelCodes) -> pl.BlockSpec:
    """Ranges of channels, groups last: a tile stays while blocks of slots take their groups out of it."""
    tile = range_tile(keys)

    def at_tile(row, head, part, at, ends, _):
        at = jnp.minimum(at, jnp.maximum(ends[row, head] - 1, 0))
        return row, head, 0, jax.lax.div(at * (block // keys.group), tile)

    return pl.BlockSpec((1, share, keys.width, tile), at_tile)


def _whole(share: int, shape: Sequence[int]) -> pl.BlockSpec:
    """All that a block of heads owns, fetched once."""
    return pl.BlockSpec((1, share, *shape), lambda row, head, *_: (row, head, *[0] * len(shape)))


def _by_row(share: int, part_rows: int, width: int) -> pl.BlockSpec:
    """What belongs to the query rows of a block of heads."""
    return pl.BlockSpec((1, share, part_rows, width), lambda row, head, part, *_: (row, head, part, 0))


def _streamed(share: int, block: int, slots_last: bool, width: int | None) -> pl.BlockSpec:
    """A block of slots; behind the longest head the last one stays, and nothing is fetched."""

    def at_slots(row, head, part, at, ends, _):
        at = jnp.minimum(at, jnp.maximum(ends[row, head] - 1, 0))
        if width is None:
            return row, head, at
        return (row, head, 0, at) if slots_last else (row, head, at, 0)

    shape = (block,) if width is None else ((width, block) if slots_last else (block, width))
    return pl.BlockSpec((1, share, *shape), at_slots)
