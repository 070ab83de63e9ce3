"""The TPU kernel of one block of slots: an online softmax, into which codes enter the matrix unit as integers.

With c a code, s its scale and m its minimum, q . (c s + m) is (q s) . c + q . m where a range belongs to channels, and
s (q . c) + m sum(q) where it belongs to a slot; likewise for the weights of the values. So scales touch the few query
rows and never the many codes.

Ranges of channels are a row of D numbers a group. Where D does not fill lanes, memory holds them turned about, groups
last; they come as tiles of 128 groups, which are turned on the chip.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvx.kernels.decode_attention.call import Call
from kvx.kernels.decode_attention.operands import Operand, Rows
from kvx.kernels.implementations import LANES
from kvx.kernels.logits import capped
from kvx.kernels.quantize_pack.coded import ChannelCodes, range_minimum, range_scale

UNSEEN = -1e30
"""Maximum of no logits: finite, so that the difference of two of them is a number."""


@dataclass(frozen=True)
class Layout:
    """How an operand lies; bits None: plain rows; by_slot: a range for each slot and run of channels."""

    slots_last: bool
    bits: int | None = None
    group: int = 0
    by_slot: bool = False

    @classmethod
    def of(cls, operand: Operand) -> "Layout":
        if isinstance(operand, Rows):
            return cls(operand.slots_last)
        return cls(True, operand.bits, operand.group, not isinstance(operand, ChannelCodes))


def range_tile(operand: Operand) -> int:
    """Groups of a tile of ranges that lie with their groups last; 0: they do not."""
    return LANES if isinstance(operand, ChannelCodes) and operand.groups_last else 0


@dataclass(frozen=True)
class Facts:
    """What the kernel knows of its call when it is compiled."""

    keys: Layout
    values: Layout
    share: int
    block: int
    slots: int
    bounded: bool
    heads_within: bool
    range_tile: int
    scale: float
    window: int | None
    softcap: float | None
    dtype: Any

    @classmethod
    def of(cls, call: Call, share: int, block: int, heads_within: bool) -> "Facts":
        """Of a call that is cut into blocks."""
        return cls(
            Layout.of(call.keys),
            Layout.of(call.values),
            share,
            block,
            call.keys.slots,
            call.lengths is not None,
            heads_within,
            range_tile(call.keys),
            call.scale,
            call.window,
            call.softcap,
            call.dtype,
        )


def kernel(ends, lengths, refs, outs, top, total, sums, *tiles, call: Facts) -> None:
    """One grid step: a block of slots of some query rows; the last one takes the tail and divides."""
    row, head, at = (pl.program_id(axis) for axis in (0, 1, 3))
    groups = call.block // call.keys.group if tiles else 0

    @pl.when(at == 0)
    def _():
        top[...] = jnp.full_like(top, UNSEEN)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    if tiles:

        @pl.when((at < ends[row, head]) & (jax.lax.rem(at * groups, call.range_tile) == 0))
        def _():
            for index in range(call.share):
                tiles[0][index] = refs["keys_ranges"][0, index].T

    def ranges_of(index):
        if not tiles:
            return refs["keys_ranges"][0, index]
        first = jax.lax.rem(at * groups, call.range_tile)
        return tiles[0][index, pl.ds(first, groups), :]

    @pl.when(at < ends[row, head])
    def _():
        def one(index, _):
            end = jnp.minimum(lengths[row, head * call.share + index], call.slots)
            _block_of_head(index, at * call.block, end, refs, ranges_of, outs, (top, total, sums), call)
            return 0

        jax.lax.fori_loop(0, call.share, one, 0)

    @pl.when(at == pl.num_programs(3) - 1)
    def _():
        if "tail_keys" in refs:
            for index in range(call.share):
                _tail_of_head(index, refs, (top, total, sums), call)
        mass = total[...][..., :1]
        divisor = jnp.where(mass > 0, mass, 1.0)
        outs["out"][0] = sums[...] / divisor
        outs["lse"][0] = jnp.where(mass > 0, top[...][..., :1] + jnp.log(divisor), -jnp.inf)


def _block_of_head(index, start, end, refs, ranges_of, outs, state, call: Facts) -> None:
    """One block of slots of one head."""
    queries = refs["queries"][0, index].astype(call.dtype)
    slot = start + jax.lax.broadcasted_iota(jnp.int32, (1, call.block), 1)
    ragged = call.bounded or call.slots % call.block != 0
    scores = capped(call.scale * _scores(index, queries, refs, ranges_of, call), call.softcap)
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


def _tail_of_head(index: int, refs, state, call: Facts) -> None:
    """The exact tail of one head."""
    sums = state[2]
    queries = refs["queries"][0, index].astype(call.dtype)
    keys, values = (_tail_rows(refs[f"tail_{name}"], index, call) for name in ("keys", "values"))
    places = refs["tail_positions"][0, pl.ds(index, 1), :]
    seen = _visible(refs["positions"][0], places, call.window) if "positions" in refs else places >= 0
    scores = capped(call.scale * _dot(queries, keys, True), call.softcap)
    weights, fade = _soften(index, jnp.where(seen, scores, -jnp.inf), state)
    sums[index] = sums[index] * fade + _dot(weights.astype(call.dtype), values, False)


def _tail_rows(ref, index: int, call: Facts):
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


def _scores(index, queries, refs, ranges_of, call: Facts):
    """q . k of a block, float32 (rows, slots)."""
    layout, ref = call.keys, refs["keys"]
    if layout.bits is None:
        scores = _dot(queries, _floats(ref[0, index], call.dtype), not layout.slots_last)
        return scores * _scale(refs["keys_scale"], index) if "keys_scale" in refs else scores
    codes, ranges = _codes(ref[0, index], layout.bits, call.dtype), ranges_of(index)
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


def _weighted(index, weights, present, start, end, refs, call: Facts):
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
    return ref[0, index]


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
