"""Decode attention on TPUs by Pallas: blocks of slots stream through VMEM, codes enter the matrix unit as integers.

With c a code, s its scale and m its minimum, q . (c s + m) is (q s) . c + q . m where a range belongs to channels, and
s (q . c) + m sum(q) where it belongs to a slot; likewise for the weights of the values. So scales touch the few query
rows and never the many codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvx.kernels.decode_attention.call import LONGEST_RUN, Call, Found, with_tail_logits
from kvx.kernels.decode_attention.operands import Operand, Rows
from kvx.kernels.logits import capped
from kvx.kernels.merge_partials import Partial
from kvx.kernels.quantize_pack.coded import ChannelCodes, range_minimum, range_scale

LANES, SUBLANES = 128, 8
UNSEEN = -1e30
"""Maximum of no logits: finite, so that the difference of two of them is a number."""


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
"""Of keys and values together; two blocks are in flight, and a v5e kernel has 16 MiB of VMEM."""


def refusal(call: Call) -> str | None:
    """Why the kernel cannot take the call; None if it can."""
    if call.length > LONGEST_RUN:
        return f"queries has {call.length} tokens a row, the kernel takes up to {LONGEST_RUN}"
    if call.queries.dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries has dtype {call.queries.dtype}, the kernel takes bfloat16 and float32"
    for name, operand in (("keys", call.keys), ("values", call.values)):
        if reason := _operand_refusal(name, operand):
            return reason
    return None


def _operand_refusal(name: str, operand: Operand) -> str | None:
    if isinstance(operand, Rows):
        if operand.width % LANES and not operand.slots_last:
            return (
                f"{name} has rows of {operand.width} channels along the lanes, the kernel takes multiples of {LANES}, "
                "or rows with slots_last=True"
            )
        return None
    if operand.bits not in (2, 4, 8) or operand.lower is not None:
        kind = "nested codes" if operand.lower is not None else f"codes of {operand.bits} bits"
        return f"{name} has {kind}, the kernel takes plain ones of 2, 4 or 8"
    if operand.group % 32:
        return f"{name} has groups of {operand.group}, the kernel takes multiples of 32"
    return None


def attend(call: Call, tuning: Tuning | None = None) -> Found:
    """A grid over rows, blocks of heads and blocks of slots; blocks behind the longest head are not fetched."""
    batch, heads, rows, _ = call.queries.shape
    slots, width = call.keys.slots, call.values.width
    # Positions lie heads by slots: a block of heads fills whole tiles of sublanes, or is all of them.
    share = SUBLANES if heads % SUBLANES == 0 else heads
    block = _block(call, share, (tuning or Tuning()).block)
    blocks = pl.cdiv(slots, block)
    lengths = jnp.full((batch, heads), slots, jnp.int32) if call.lengths is None else call.lengths.astype(jnp.int32)
    ends = jnp.max(pl.cdiv(lengths.reshape(batch, -1, share), block), axis=-1)
    inputs, specs = _inputs(call, share, block)
    # Logits with the T queries of a head apart, as the caller will show them: put apart later, they would be copied.
    apart = (rows // call.length, call.length, slots)
    shapes = {"out": (rows, width), "lse": (rows, 1)} | ({"logits": apart} if call.logits else {})
    found = pl.pallas_call(
        partial(_kernel, call=_static(call, share, block)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // share, blocks),
            in_specs=[specs],
            out_specs={
                name: pl.BlockSpec((1, share, *apart[:2], block), lambda row, head, at, *_: (row, head, 0, 0, at))
                if name == "logits"
                else _whole(share, shape)
                for name, shape in shapes.items()
            },
            scratch_shapes=[
                pltpu.VMEM((share, rows, LANES), jnp.float32),
                pltpu.VMEM((share, rows, LANES), jnp.float32),
                pltpu.VMEM((share, rows, width), jnp.float32),
            ],
        ),
        out_shape={name: jax.ShapeDtypeStruct((batch, heads, *shape), jnp.float32) for name, shape in shapes.items()},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="decode_attention",
    )(ends, lengths, inputs)
    part = Partial(found["out"], found["lse"][..., 0])
    if not call.logits:
        return part, None
    return part, with_tail_logits(call, found["logits"].reshape(batch, heads, rows, slots))


def _block(call: Call, share: int, wanted: int | None) -> int:
    """Slots of a grid step: whole tiles of every operand, or all slots."""
    bytes_per_slot, unit = 0, LANES
    for operand in (call.keys, call.values):
        array = operand.array if isinstance(operand, Rows) else operand.words
        bytes_per_slot += share * array.shape[2] * array.shape[3] * array.dtype.itemsize // operand.slots
        if isinstance(operand, ChannelCodes):
            step = operand.group * SUBLANES
            unit = unit * step // gcd(unit, step)
    limit = 2048 if isinstance(call.keys, Rows) else 1024
    block = wanted or min(max(BLOCK_BYTES // bytes_per_slot, unit), limit)
    block = max(block // unit, 1) * unit
    return min(block, call.keys.slots)


def _inputs(call: Call, share: int, block: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays of a call by name, and their blocks."""
    along_last = partial(_streamed, share, block, True)
    arrays, specs = {"queries": call.queries}, {"queries": _whole(share, call.queries.shape[2:])}

    def put(name, array, spec):
        arrays[name], specs[name] = array, spec

    for name, operand in (("keys", call.keys), ("values", call.values)):
        if isinstance(operand, Rows):
            put(name, operand.array, _streamed(share, block, operand.slots_last, operand.width))
            if operand.scale is not None and operand.scale.shape[-1] == operand.slots:
                put(f"{name}_scale", operand.scale, along_last(None))
            elif operand.scale is not None:
                put(f"{name}_scale", operand.scale, _whole(share, (1,)))
        else:
            put(name, operand.words, along_last(operand.words.shape[2]))
            if isinstance(operand, ChannelCodes):
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
        put("positions", rows, pl.BlockSpec((1, *rows.shape[1:]), lambda row, head, at, *_: (row, 0, 0)))
    return arrays, specs


def _heads_within(call: Call) -> bool:
    """Whether XLA lays a tail with the heads inside its entries, because the entries do not fill whole tiles."""
    assert call.tail is not None, "asked for where there is one"
    entries, heads = call.tail.keys.shape[2], call.queries.shape[1]
    return entries % SUBLANES != 0 and heads % SUBLANES == 0


def _whole(share: int, shape: Sequence[int]) -> pl.BlockSpec:
    """All that a block of heads owns, fetched once."""
    return pl.BlockSpec((1, share, *shape), lambda row, head, at, *_: (row, head, *[0] * len(shape)))


def _streamed(share: int, block: int, slots_last: bool, width: int | None) -> pl.BlockSpec:
    """A block of slots; behind the longest head the last one stays, and nothing is fetched."""

    def at_slots(row, head, at, ends, _):
        at = jnp.minimum(at, jnp.maximum(ends[row, head] - 1, 0))
        if width is None:
            return row, head, at
        return (row, head, 0, at) if slots_last else (row, head, at, 0)

    shape = (block,) if width is None else ((width, block) if slots_last else (block, width))
    return pl.BlockSpec((1, share, *shape), at_slots)


@dataclass(frozen=True)
class _Facts:
    """What the kernel knows of its call when it is compiled."""

    keys: "_Layout"
    values: "_Layout"
    share: int
    block: int
    slots: int
    bounded: bool
    heads_within: bool
    scale: float
    window: int | None
    softcap: float | None
    dtype: Any


@dataclass(frozen=True)
class _Layout:
    """How an operand lies; bits None: plain rows; by_slot: a range for each slot and run of channels."""

    slots_last: bool
    bits: int | None = None
    group: int = 0
    by_slot: bool = False

    @classmethod
    def of(cls, operand: Operand) -> "_Layout":
        if isinstance(operand, Rows):
            return cls(operand.slots_last)
        return cls(True, operand.bits, operand.group, not isinstance(operand, ChannelCodes))


def _static(call: Call, share: int, block: int) -> _Facts:
    stored = [operand.array.dtype for operand in (call.keys, call.values) if isinstance(operand, Rows)]
    exact = any(dtype == jnp.float32 for dtype in (call.queries.dtype, *stored))
    return _Facts(
        _Layout.of(call.keys),
        _Layout.of(call.values),
        share,
        block,
        call.keys.slots,
        call.lengths is not None,
        call.tail is not None and _heads_within(call),
        call.scale,
        call.window,
        call.softcap,
        jnp.float32 if exact else jnp.bfloat16,
    )


def _kernel(ends, lengths, refs, outs, top, total, sums, *, call: _Facts) -> None:
    row, head, at = (pl.program_id(axis) for axis in range(3))

    @pl.when(at == 0)
    def _():
        top[...] = jnp.full_like(top, UNSEEN)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(at < ends[row, head])
    def _():
        def one(index, _):
            end = jnp.minimum(lengths[row, head * call.share + index], call.slots)
            _block_of_head(index, at * call.block, end, refs, outs, (top, total, sums), call)
            return 0

        jax.lax.fori_loop(0, call.share, one, 0)

    @pl.when(at == pl.num_programs(2) - 1)
    def _():
        if "tail_keys" in refs:
            for index in range(call.share):
                _tail_of_head(index, refs, (top, total, sums), call)
        mass = total[...][..., :1]
        divisor = jnp.where(mass > 0, mass, 1.0)
        outs["out"][0] = sums[...] / divisor
        outs["lse"][0] = jnp.where(mass > 0, top[...][..., :1] + jnp.log(divisor), -jnp.inf)


def _block_of_head(index, start, end, refs, outs, state, call: _Facts) -> None:
    """One block of slots of one head."""
    queries = refs["queries"][0, index].astype(call.dtype)
    slot = start + jax.lax.broadcasted_iota(jnp.int32, (1, call.block), 1)
    ragged = call.bounded or call.slots % call.block != 0
    scores = capped(call.scale * _scores(index, queries, refs, call), call.softcap)
    if "bias" in refs:
        scores = scores + refs["bias"][0, pl.ds(index, 1), :]
    seen = slot < end if ragged else None
    if "slots" in refs:
        visible = _visible(refs["positions"][0], refs["slots"][0, pl.ds(index, 1), :], call.window)
        seen = visible if seen is None else seen & visible
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    if "logits" in outs:
        outs["logits"][0, index] = scores.reshape(outs["logits"].shape[2:])
    weights, fade = _soften(index, scores, state)
    present = slot < end if ragged else None
    state[2][index] = state[2][index] * fade + _weighted(index, weights, present, start, end, refs, call)


def _tail_of_head(index: int, refs, state, call: _Facts) -> None:
    """The exact tail of one head."""
    sums = state[2]
    queries = refs["queries"][0, index].astype(call.dtype)
    keys, values = (_tail_rows(refs[f"tail_{name}"], index, call) for name in ("keys", "values"))
    places = refs["tail_positions"][0, pl.ds(index, 1), :]
    seen = _visible(refs["positions"][0], places, call.window) if "positions" in refs else places >= 0
    scores = capped(call.scale * _dot(queries, keys, True), call.softcap)
    weights, fade = _soften(index, jnp.where(seen, scores, -jnp.inf), state)
    sums[index] = sums[index] * fade + _dot(weights.astype(call.dtype), values, False)


def _tail_rows(ref, index: int, call: _Facts):
    """Entries of a head; one of the heads within the entries comes out of a tile in 32 bits only."""
    if call.heads_within:
        return ref[0].astype(jnp.float32)[:, index].astype(call.dtype)
    return ref[0, index].astype(call.dtype)


def _soften(index, scores, state):
    """Weights of one more block under the maximum so far, and what the earlier sums are multiplied by."""
    top, total, _ = state
    before = top[index][:, :1]
    higher = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
    fade, weights = jnp.exp(before - higher), jnp.exp(scores - higher)
    mass = total[index][:, :1] * fade + jnp.sum(weights, axis=-1, keepdims=True)
    top[index] = jnp.broadcast_to(higher, top.shape[1:])
    total[index] = jnp.broadcast_to(mass, total.shape[1:])
    return weights, fade


def _scores(index, queries, refs, call: _Facts):
    """q . k of a block, float32 (rows, slots)."""
    layout, ref = call.keys, refs["keys"]
    if layout.bits is None:
        scores = _dot(queries, _floats(ref[0, index], call.dtype), not layout.slots_last)
        return scores * _scale(refs["keys_scale"], index) if "keys_scale" in refs else scores
    codes, ranges = _codes(ref[0, index], layout.bits, call.dtype), refs["keys_ranges"][0, index]
    scale, minimum = range_scale(ranges), range_minimum(ranges)
    if layout.by_slot:
        parts = [
            _dot(run, codes[at : at + layout.group], False) * scale[i : i + 1]
            + jnp.sum(run.astype(jnp.float32), axis=-1, keepdims=True) * minimum[i : i + 1]
            for i, at in enumerate(range(0, codes.shape[0], layout.group))
            for run in (queries[:, at : at + layout.group],)
        ]
        return sum(parts[1:], parts[0])
    wide, parts = queries.astype(jnp.float32), []
    for i, at in enumerate(range(0, codes.shape[1], layout.group)):
        scaled = (wide * scale[i : i + 1]).astype(call.dtype)
        offset = jnp.sum(wide * minimum[i : i + 1], axis=-1, keepdims=True)
        parts.append(_dot(scaled, codes[:, at : at + layout.group], False) + offset)
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _weighted(index, weights, present, start, end, refs, call: _Facts):
    """Sum of weights times values of a block, float32 (rows, channels)."""
    layout, ref = call.values, refs["values"]
    if layout.bits is None:
        values = _floats(ref[0, index], call.dtype)
        if present is not None:
            # What lies behind the last slot is any bits at all, and 0 * nan is nan.
            if not layout.slots_last:
                present = start + jax.lax.broadcasted_iota(jnp.int32, (call.block, 1), 0) < end
            values = jnp.where(present, values, jnp.zeros_like(values))
        if "values_scale" in refs:
            scale = _scale(refs["values_scale"], index)
            weights = weights * (scale if present is None else jnp.where(weights > 0, scale, 0.0))
        return _dot(weights.astype(call.dtype), values, layout.slots_last)
    codes, ranges = _codes(ref[0, index], layout.bits, call.dtype), refs["values_ranges"][0, index]
    scale, minimum = range_scale(ranges), range_minimum(ranges)
    parts = []
    for i, at in enumerate(range(0, codes.shape[0], layout.group)):
        both = scale[i : i + 1], minimum[i : i + 1]
        if present is not None:
            both = tuple(jnp.where(present, part, 0.0) for part in both)
        scaled = (weights * both[0]).astype(call.dtype)
        offset = jnp.sum(weights * both[1], axis=-1, keepdims=True)
        parts.append(_dot(scaled, codes[at : at + layout.group], True) + offset)
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _codes(words, bits: int, dtype):
    """Codes (channels, slots) of words (w, slots), as floats: integers up to 255 are exact in bfloat16."""
    if bits == 8:
        return pltpu.bitcast(words, jnp.uint8).astype(jnp.int32).astype(jnp.float32).astype(dtype)
    count, slots = words.shape
    per_word = 32 // bits
    spread = jnp.broadcast_to(words[:, None, :], (count, per_word, slots))
    shifts = jax.lax.broadcasted_iota(jnp.uint32, spread.shape, 1) * bits
    codes = ((spread >> shifts) & (2**bits - 1)).astype(jnp.int32)
    return codes.reshape(count * per_word, slots).astype(jnp.float32).astype(dtype)


def _floats(rows, dtype):
    """Rows in the dtype of the product; 8-bit ones through float32, which every chip can do."""
    return rows.astype(dtype) if rows.dtype.itemsize > 1 else rows.astype(jnp.float32).astype(dtype)


def _scale(ref, index):
    """Scale of each slot of a head, or of the head: a row."""
    return ref[0, pl.ds(index, 1), :]


def _visible(positions, slots, window: int | None):
    """Which slots each row sees; positions are a column, slots a row."""
    age = positions - slots
    seen = (slots >= 0) & (age >= 0)
    return seen if window is None else seen & (age < window)


def _dot(a, b, turned: bool):
    """Rows of a by columns of b (rows if `turned`), accumulated in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
