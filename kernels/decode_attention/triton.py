"""Decode attention on GPUs by Pallas-Triton: one program per row, KV head and split of the slots, merged by a second.

Codes come apart in registers. A word holds the codes of neighbouring channels, so that one shift over a tile of words
(rows of words, slots) gives a tile of codes, one channel of every word: a "plane". Planes are the operands of the
tensor cores; the queries' channels are loaded, and the output's stored, in the order of the planes. Fewer than 16 word
rows are too few for a tensor core: each is then loaded several times, its copies shifted apart from the start.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kvx.kernels.decode_attention.call import LONGEST_RUN, Call, Found, with_tail_logits
from kvx.kernels.decode_attention.operands import Operand, Rows
from kvx.kernels.merge_partials import Partial
from kvx.kernels.quantize_pack.coded import ChannelCodes

ROWS = 16
"""Least rows, columns and depth of a product on tensor cores."""

LOG2E = 1.4426950408889634
UNSEEN = -1e30
"""Maximum of no logits: finite, so that the difference of two of them is a number."""


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; the results are the same up to rounding.

    Attributes:
        block: slots of one turn of the loop, a power of 2 from 16 up; with per-channel keys at most their group.
        splits: programs a row and KV head, a power of 2; None: enough to fill the chip several times over.
        num_warps: of a program.
        num_stages: blocks in flight.
        interpret: run as plain JAX, on any platform.
    """

    block: int = 64
    splits: int | None = None
    num_warps: int = 4
    num_stages: int = 3
    interpret: bool = False


CANDIDATES = tuple(
    Tuning(block, splits, warps, stages)
    for block, warps, stages in ((64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 2, 3), (128, 4, 2), (128, 4, 3), (128, 8, 3))
    for splits in (8, 16, 32)
)
"""What a benchmark tries."""

PROGRAMS = 1024
"""Programs that fill a chip of 132 multiprocessors several times over."""


def default_tuning(call: Call) -> Tuning:
    """By kind of operand and number of heads."""
    batch, heads = call.queries.shape[:2]
    tuning = Tuning() if isinstance(call.keys, Rows) else Tuning(num_stages=3)
    blocks = pl.cdiv(call.keys.slots, tuning.block)
    wanted = min(max(PROGRAMS // (batch * heads), 1), max(blocks // 4, 1), 64)
    return replace(tuning, splits=1 << (wanted.bit_length() - 1))


def refusal(call: Call) -> str | None:
    """Why the kernel cannot take the call; None if it can."""
    if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11):
        return f"jax is {jax.__version__}, GPU kernels need 0.11 or later"
    if call.length > LONGEST_RUN:
        return f"queries has {call.length} tokens a row, the kernel takes up to {LONGEST_RUN}"
    if call.queries.dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries has dtype {call.queries.dtype}, the kernel takes bfloat16 and float32"
    for name, operand in (("keys", call.keys), ("values", call.values)):
        if reason := _operand_refusal(name, operand):
            return reason
    return None


def _operand_refusal(name: str, operand: Operand) -> str | None:
    width = operand.width
    if width < ROWS or width & (width - 1):
        return f"{name} has rows of {width} channels, the kernel takes powers of 2 from {ROWS} up"
    if isinstance(operand, Rows):
        return None
    if operand.bits not in (2, 4, 8) or operand.lower is not None:
        kind = "nested codes" if operand.lower is not None else f"codes of {operand.bits} bits"
        return f"{name} has {kind}, the kernel takes plain ones of 2, 4 or 8"
    group = operand.group
    if group < ROWS or group & (group - 1):
        return f"{name} has groups of {group}, the kernel takes powers of 2 from {ROWS} up"
    return None


def attend(call: Call, tuning: Tuning | None = None) -> Found:
    """Splits of the slots, each with its own partial softmax; the tail belongs to the first."""
    tuning = tuning or default_tuning(call)
    tuning = tuning if tuning.splits else replace(tuning, splits=default_tuning(call).splits)
    if isinstance(call.keys, ChannelCodes):
        tuning = replace(tuning, block=min(tuning.block, call.keys.group))
    splits = tuning.splits
    batch, heads, rows, _ = call.queries.shape
    slots, width = call.keys.slots, call.values.width
    inputs, specs = _inputs(call)
    shapes = {"out": ((splits, rows, width), jnp.float32), "lse": ((splits, rows), jnp.float32)}
    if call.logits:
        shapes["logits"] = ((rows, slots), jnp.float32)
    found = pl.pallas_call(
        partial(_kernel, call=_static(call), tuning=tuning),
        grid=(splits, heads, batch),
        in_specs=[specs],
        out_specs={name: _whole(shape) for name, (shape, _) in shapes.items()},
        out_shape={
            name: jax.ShapeDtypeStruct((batch, heads, *shape), dtype) for name, (shape, dtype) in shapes.items()
        },
        compiler_params=plgpu.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=tuning.interpret,
        name="decode_attention",
    )(inputs)
    part = Partial(found["out"][:, :, 0], found["lse"][:, :, 0])
    if splits > 1:
        part = _merged(found["out"], found["lse"], tuning)
    return part, with_tail_logits(call, found["logits"]) if call.logits else None


def _inputs(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays of a call by name, and their blocks: what one row and KV head owns."""
    arrays = {"queries": call.queries}
    for name, operand in (("keys", call.keys), ("values", call.values)):
        if isinstance(operand, Rows):
            arrays[name] = operand.array
            if operand.scale is not None:
                arrays[f"{name}_scale"] = operand.scale
        else:
            arrays |= {name: operand.words, f"{name}_ranges": operand.ranges}
    arrays |= {name: array for name, array in (("slots", call.slots), ("bias", call.bias)) if array is not None}
    if call.tail is not None:
        arrays |= {f"tail_{name}": getattr(call.tail, name) for name in ("keys", "values", "positions")}
    specs = {name: _whole(array.shape[2:]) for name, array in arrays.items()}
    if call.lengths is not None:
        arrays["lengths"] = call.lengths[..., None]
        specs["lengths"] = _whole((1,))
    if call.positions is not None:
        arrays["positions"] = call.positions
        specs["positions"] = pl.BlockSpec((None, call.length), lambda split, head, row: (row, 0))
    return arrays, specs


def _whole(shape: Sequence[int]) -> pl.BlockSpec:
    """All that a row and head owns."""
    return pl.BlockSpec((None, None, *shape), lambda split, head, row: (row, head, *[0] * len(shape)))


@dataclass(frozen=True)
class _Facts:
    """What a kernel knows of its call when it is compiled."""

    keys: "_Layout"
    values: "_Layout"
    rows: int
    length: int
    slots: int
    entries: int
    scale: float
    window: int | None
    softcap: float | None
    dtype: Any

    @property
    def padded(self) -> int:
        """Query rows, a power of 2."""
        return max(ROWS, 1 << (self.rows - 1).bit_length())


@dataclass(frozen=True)
class _Layout:
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
    def of(cls, operand: Operand) -> "_Layout":
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

    def channels(self, plane: int) -> jax.Array:
        """Channel of each row of a plane's tile."""
        row = jax.lax.iota(jnp.int32, self.depth)
        return row * self.planes + plane


def _static(call: Call) -> _Facts:
    stored = [operand.array.dtype for operand in (call.keys, call.values) if isinstance(operand, Rows)]
    exact = any(dtype == jnp.float32 for dtype in (call.queries.dtype, *stored))
    return _Facts(
        _Layout.of(call.keys),
        _Layout.of(call.values),
        call.queries.shape[2],
        call.length,
        call.keys.slots,
        0 if call.tail is None else call.tail.keys.shape[2],
        call.scale,
        call.window,
        call.softcap,
        jnp.float32 if exact else jnp.bfloat16,
    )


def _kernel(refs: dict[str, Any], outs: dict[str, Any] | Any, *, call: _Facts, tuning: Tuning) -> None:
    split, block = pl.program_id(0), tuning.block
    row = jax.lax.iota(jnp.int32, call.padded)
    real = row < call.rows
    spots = None
    if "positions" in refs:
        spots = plgpu.load(refs["positions"].at[row % call.length])
    end = jnp.int32(call.slots)
    if "lengths" in refs:
        end = jnp.minimum(end, refs["lengths"][0])
    blocks = pl.cdiv(call.slots, block)
    share = pl.cdiv(blocks, tuning.splits)
    first = split * share
    turns = jnp.clip(pl.cdiv(end, block) - first, 0, share)
    # Loads need a mask where a block may reach beyond the last slot; what lies behind a length is any bits at all.
    ragged = "lengths" in refs or call.slots % block != 0

    queries = [
        _queries(refs["queries"], row, real, call.keys.channels(plane), call.dtype) for plane in range(call.keys.planes)
    ]

    def turn(index, state):
        start = (first + index) * block
        slot = start + jax.lax.iota(jnp.int32, block)
        inside = slot < end if ragged else None
        scores = _products(queries, _tiles("keys", refs, call.keys, start, block, inside, call.dtype))
        if "keys_scale" in refs:
            scores = scores * _scale(refs["keys_scale"], start, block, inside)
        scores = _capped(scores, call)
        if "bias" in refs:
            scores = scores + _load(refs["bias"], (pl.ds(start, block),), inside, 0.0)[None, :]
        places = _load(refs["slots"], (pl.ds(start, block),), inside, -1) if "slots" in refs else None
        scores = jnp.where(_seen(spots, places, inside, call.window, scores.shape), scores, -jnp.inf)
        if "logits" in outs:
            shown = real[:, None] & (inside[None, :] if ragged else jnp.full((1, block), True))
            plgpu.store(outs["logits"].at[row, pl.ds(start, block)], scores, mask=shown)
        weigh = _scale(refs["values_scale"], start, block, inside) if "values_scale" in refs else None
        return _step(state, scores, weigh, _tiles("values", refs, call.values, start, block, inside, call.dtype), call)

    state = (
        jnp.full((call.padded,), UNSEEN, jnp.float32),
        jnp.zeros((call.padded,), jnp.float32),
        tuple(jnp.zeros((call.padded, call.values.depth), jnp.float32) for _ in range(call.values.planes)),
    )
    state = jax.lax.fori_loop(0, turns, turn, state)
    if call.entries:
        wanted = jnp.where(split == 0, pl.cdiv(call.entries, ROWS), 0)
        state = jax.lax.fori_loop(0, wanted, partial(_tail_turn, refs, call, row, real, spots), state)
    top, total, sums = state
    divisor = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, (top + jnp.log2(divisor)) / LOG2E, -jnp.inf)
    plgpu.store(outs["lse"].at[split, row], lse, mask=real)
    for plane, part in enumerate(sums):
        channels = call.values.channels(plane)
        shape = part.shape
        target = outs["out"].at[split, _across(row[:, None], shape), _across(channels[None, :], shape)]
        plgpu.store(target, part / divisor[:, None], mask=_across(real[:, None], shape))


def _tail_turn(refs, call: _Facts, row, real, spots, index, state):
    """One block of the exact tail."""
    entry = index * ROWS + jax.lax.iota(jnp.int32, ROWS)
    inside = entry < call.entries
    columns = jax.lax.iota(jnp.int32, call.keys.width)
    queries = _queries(refs["queries"], row, real, columns, call.dtype)
    keys = _gather(refs["tail_keys"], entry, columns, inside[:, None], call.dtype)
    scores = _capped(_dot(queries, keys, True), call)
    places = plgpu.load(refs["tail_positions"].at[entry], mask=inside, other=-1)
    spots = jnp.full((call.padded,), jnp.iinfo(jnp.int32).max) if spots is None else spots
    window = call.window
    scores = jnp.where(_seen(spots, places, None, window, scores.shape), scores, -jnp.inf)
    tiles = (
        (_gather(refs["tail_values"], entry, call.values.channels(plane), inside[:, None], call.dtype), False)
        for plane in range(call.values.planes)
    )
    return _step(state, scores, None, tiles, call)


def _step(state, scores, weigh, tiles, call: _Facts):
    """One more block of an online softmax, its exponents in base 2."""
    top, total, sums = state
    scores = scores * LOG2E
    higher = jnp.maximum(top, jnp.max(scores, axis=1))
    fade = jnp.exp2(top - higher)
    weights = jnp.exp2(scores - higher[:, None])
    total = total * fade + jnp.sum(weights, axis=1)
    weights = (weights if weigh is None else weights * weigh).astype(call.dtype)
    sums = tuple(
        part * fade[:, None] + _dot(weights, tile, turned) for part, (tile, turned) in zip(sums, tiles, strict=True)
    )
    return higher, total, sums


def _products(queries, tiles):
    """Sum over the planes; a tile is (channels, slots) if turned, else (slots, channels)."""
    scores = None
    for rows, (tile, turned) in zip(queries, tiles, strict=True):
        product = _dot(rows, tile, not turned)
        scores = product if scores is None else scores + product
    return scores


def _tiles(name: str, refs, layout: _Layout, start, block: int, inside, dtype):
    """(tile, turned) of each plane; turned: slots along the last axis."""
    ref = refs[name]
    if layout.bits is None:
        window = (slice(None), pl.ds(start, block)) if layout.slots_last else (pl.ds(start, block), slice(None))
        mask = None if inside is None else (inside[None, :] if layout.slots_last else inside[:, None])
        yield _floats(ref, window, mask, dtype), layout.slots_last
        return
    row = jax.lax.iota(jnp.int32, layout.depth)
    mask = None if inside is None else inside[None, :]
    slot = start + jax.lax.iota(jnp.int32, block)

    def by_row(ref, which):
        shape = (layout.depth, block)
        return _load(ref, (_across(which[:, None], shape), _across(slot[None, :], shape)), mask, 0)

    words = by_row(ref, row // layout.copies)
    if layout.copies > 1:
        words = words >> (row % layout.copies * (layout.bits * layout.planes)).astype(jnp.uint32)[:, None]
    if layout.by_slot:
        # All planes of a word share their run of channels: a run is no narrower than a tile row's channels.
        steps = _affine(by_row(refs[f"{name}_ranges"], row * layout.planes // layout.group), layout.bits)
    for plane in range(layout.planes):
        if not layout.by_slot:
            channels = layout.channels(plane)
            blocks = _across(start // layout.group, channels.shape)
            ranges = plgpu.load(refs[f"{name}_ranges"].at[blocks, channels])
            steps = tuple(part[:, None] for part in _affine(ranges, layout.bits))
        # A code in the highest bits of the mantissa of a 1 makes 1 + c / 2^b without a conversion from integers.
        shift = 23 - layout.bits * (plane + 1)
        moved = words << np.uint32(shift) if shift >= 0 else words >> np.uint32(-shift)
        code = (moved & np.uint32((2**layout.bits - 1) << (23 - layout.bits))) | np.uint32(0x3F800000)
        yield (jax.lax.bitcast_convert_type(code, jnp.float32) * steps[0] + steps[1]).astype(dtype), True


def _affine(ranges, bits: int):
    """Factor and offset that turn 1 + c / 2^b into c * s + m."""
    scale = jax.lax.bitcast_convert_type(ranges & np.uint32(0xFFFF0000), jnp.float32) * np.float32(2**bits)
    return scale, jax.lax.bitcast_convert_type(ranges << np.uint32(16), jnp.float32) - scale


def _seen(spots, places, inside, window: int | None, shape):
    """Which slots each row sees."""
    seen = None
    if spots is not None and places is not None:
        age = spots[:, None] - places[None, :]
        seen = (places[None, :] >= 0) & (age >= 0)
        seen = seen if window is None else seen & (age < window)
    if inside is not None:
        seen = inside[None, :] if seen is None else seen & inside[None, :]
    return jnp.full(shape, True) if seen is None else _across(seen, shape)


def _capped(scores, call: _Facts):
    scores = scores * call.scale
    if call.softcap is None:
        return scores
    # tanh x = 1 - 2 / (e^(2x) + 1), right at both infinities.
    return call.softcap * (1.0 - 2.0 / (jnp.exp2(scores * (2 * LOG2E / call.softcap)) + 1.0))


def _queries(ref, row, real, channels, dtype):
    return _gather(ref, row, channels, real[:, None], dtype)


def _gather(ref, rows, columns, mask, dtype):
    """A tile of any rows and columns; zeros where not `mask`."""
    shape = (rows.shape[0], columns.shape[0])
    index = (_across(rows[:, None], shape), _across(columns[None, :], shape))
    return plgpu.load(ref.at[index], mask=_across(mask, shape), other=0).astype(dtype)


def _scale(ref, start, block: int, inside):
    """Scale of each slot, or of the head."""
    if ref.shape[-1] == 1:
        return ref[0]
    return _load(ref, (pl.ds(start, block),), inside, 0.0)[None, :]


def _floats(ref, index, mask, dtype):
    """Rows in the dtype of the product, zeros where not `mask`; 8-bit floats have no constants to load instead."""
    if mask is None or ref.dtype != jnp.float8_e4m3fn:
        return _load(ref, index, mask, 0).astype(dtype)
    rows = plgpu.load(ref.at[index], mask=mask).astype(dtype)
    return jnp.where(mask, rows, jnp.zeros_like(rows))


def _load(ref, index, mask, other):
    if mask is None:
        return plgpu.load(ref.at[index])
    shape = index[0].shape if hasattr(index[0], "shape") else mask.shape
    return plgpu.load(ref.at[index], mask=_across(mask, shape), other=other)


def _dot(a, b, turned: bool):
    """Rows of a by columns of b (rows if `turned`), accumulated in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _across(array, shape):
    return jnp.broadcast_to(array, shape)


def _merged(out: jax.Array, lse: jax.Array, tuning: Tuning) -> Partial:
    """Partials (B, G, splits, Q, V) merged by log-sum-exp, one program a query row."""
    batch, heads, splits, rows, width = out.shape

    def kernel(out_ref, lse_ref, merged_ref, total_ref):
        found = lse_ref[...]
        top = jnp.maximum(jnp.max(found, axis=0), UNSEEN)
        weights = jnp.exp2((found - top) * LOG2E)
        total = jnp.sum(weights, axis=0)
        divisor = jnp.where(total > 0, total, 1.0)
        merged_ref[...] = jnp.sum(out_ref[...] * weights[:, None], axis=0) / divisor
        total_ref[0] = jnp.where(total > 0, top + jnp.log2(divisor) / LOG2E, -jnp.inf)

    merged, total = pl.pallas_call(
        kernel,
        grid=(rows, heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, splits, None, width), lambda row, head, at: (at, head, 0, row, 0)),
            pl.BlockSpec((None, None, splits, None), lambda row, head, at: (at, head, 0, row)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, width), lambda row, head, at: (at, head, row, 0)),
            pl.BlockSpec((None, None, None, 1), lambda row, head, at: (at, head, row, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, rows, 1), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=1),
        interpret=tuning.interpret,
        name="merge_splits",
    )(out, lse)
    return Partial(merged, total[..., 0])
