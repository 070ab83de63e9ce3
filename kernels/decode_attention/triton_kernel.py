"""The GPU kernel of one split of a head's slots: an online softmax over blocks, and over the exact tail."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kvx.kernels.decode_attention.call import Call
from kvx.kernels.decode_attention.triton_tiles import ROWS, Layout, across, dot, gather, load, tiles

LOG2E = 1.4426950408889634
UNSEEN = -1e30
"""Maximum of no logits: finite, so that the difference of two of them is a number."""


@dataclass(frozen=True)
class Facts:
    """What a kernel knows of its call when it is compiled."""

    keys: Layout
    values: Layout
    rows: int
    length: int
    slots: int
    entries: int
    scale: float
    window: int | None
    softcap: float | None
    dtype: Any
    block: int
    splits: int
    packed: bool

    @classmethod
    def of(cls, call: Call, block: int, splits: int, packed: bool) -> "Facts":
        """Of a call that is cut so."""
        return cls(
            Layout.of(call.keys),
            Layout.of(call.values),
            call.queries.shape[2],
            call.length,
            call.keys.slots,
            0 if call.tail is None else call.tail.keys.shape[2],
            call.scale,
            call.window,
            call.softcap,
            call.dtype,
            block,
            splits,
            packed and call.dtype == jnp.bfloat16,
        )

    @property
    def padded(self) -> int:
        """Query rows, a power of 2."""
        return max(ROWS, 1 << (self.rows - 1).bit_length())


def kernel(refs: dict[str, Any], outs: dict[str, Any], *, call: Facts) -> None:
    """One row, KV head and split; refs and outs by name, each what the row and head own."""
    split, block = pl.program_id(0), call.block
    row = jax.lax.iota(jnp.int32, call.padded)
    real = row < call.rows
    spots = None
    if "positions" in refs:
        spots = plgpu.load(refs["positions"].at[row % call.length])
    end = jnp.int32(call.slots)
    if "lengths" in refs:
        end = jnp.minimum(end, refs["lengths"][0])
    blocks = pl.cdiv(call.slots, block)
    share = pl.cdiv(blocks, call.splits)
    first = split * share
    turns = jnp.clip(pl.cdiv(end, block) - first, 0, share)
    bounded = "lengths" in refs or call.slots % block != 0

    queries = [
        gather(refs["queries"], row, call.keys.channels(plane), real[:, None], call.dtype)
        for plane in range(call.keys.planes)
    ]

    def turn(index, state):
        start = (first + index) * block
        slot = start + jax.lax.iota(jnp.int32, block)
        inside = slot < end if bounded else None
        # A mask keeps loads from being wide; they need one only where a block may reach beyond the last slot.
        there = slot < call.slots if call.slots % block else None
        scores = _products(queries, tiles("keys", refs, call.keys, start, block, there, call.dtype, call.packed))
        if "keys_scale" in refs:
            scores = scores * _scale(refs["keys_scale"], start, block, there)
        scores = _capped(scores, call)
        if "bias" in refs:
            scores = scores + load(refs["bias"], (pl.ds(start, block),), there, 0.0)[None, :]
        places = load(refs["slots"], (pl.ds(start, block),), there, -1) if "slots" in refs else None
        scores = jnp.where(_seen(spots, places, inside, call.window, scores.shape), scores, -jnp.inf)
        if "logits" in outs:
            shown = real[:, None] & (jnp.full((1, block), True) if inside is None else inside[None, :])
            target = outs["logits"].at[across(row[:, None], scores.shape), across(slot[None, :], scores.shape)]
            plgpu.store(target, scores, mask=across(shown, scores.shape))
        weigh = _scale(refs["values_scale"], start, block, there) if "values_scale" in refs else None
        values = tiles("values", refs, call.values, start, block, there, call.dtype, call.packed)
        return _step(state, scores, weigh, values, call)

    state = (
        jnp.full((call.padded,), UNSEEN, jnp.float32),
        jnp.zeros((call.padded,), jnp.float32),
        tuple(jnp.zeros((call.padded, call.values.depth), jnp.float32) for _ in range(call.values.planes)),
    )
    state = jax.lax.fori_loop(0, turns, turn, state)
    if call.entries:
        # A product: the lowering makes a choice between two plain integers one between booleans.
        wanted = (split == 0).astype(jnp.int32) * pl.cdiv(call.entries, ROWS)
        state = jax.lax.fori_loop(0, wanted, partial(_tail_turn, refs, call, row, real, spots), state)
    top, total, sums = state
    divisor = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, (top + jnp.log2(divisor)) / LOG2E, -jnp.inf)
    plgpu.store(outs["lse"].at[split, row], lse, mask=real)
    for plane, part in enumerate(sums):
        channels = call.values.channels(plane)
        shape = part.shape
        target = outs["out"].at[split, across(row[:, None], shape), across(channels[None, :], shape)]
        plgpu.store(target, part / divisor[:, None], mask=across(real[:, None], shape))


def _tail_turn(refs, call: Facts, row, real, spots, index, state):
    """One block of the exact tail."""
    entry = index * ROWS + jax.lax.iota(jnp.int32, ROWS)
    inside = entry < call.entries
    columns = jax.lax.iota(jnp.int32, call.keys.width)
    queries = gather(refs["queries"], row, columns, real[:, None], call.dtype)
    keys = gather(refs["tail_keys"], entry, columns, inside[:, None], call.dtype)
    scores = _capped(dot(queries, keys, True), call)
    places = plgpu.load(refs["tail_positions"].at[entry], mask=inside, other=-1)
    spots = jnp.full((call.padded,), jnp.iinfo(jnp.int32).max) if spots is None else spots
    window = call.window
    scores = jnp.where(_seen(spots, places, None, window, scores.shape), scores, -jnp.inf)
    tiles = (
        (gather(refs["tail_values"], entry, call.values.channels(plane), inside[:, None], call.dtype), False)
        for plane in range(call.values.planes)
    )
    return _step(state, scores, None, tiles, call)


def _step(state, scores, weigh, tiles, call: Facts):
    """One more block of an online softmax, its exponents in base 2."""
    top, total, sums = state
    scores = scores * LOG2E
    higher = jnp.maximum(top, jnp.max(scores, axis=1))
    fade = jnp.exp2(top - higher)
    weights = jnp.exp2(scores - higher[:, None])
    total = total * fade + jnp.sum(weights, axis=1)
    weights = (weights if weigh is None else weights * weigh).astype(call.dtype)
    sums = tuple(
        part * fade[:, None] + dot(weights, tile, turned) for part, (tile, turned) in zip(sums, tiles, strict=True)
    )
    return higher, total, sums


def _products(queries, tiles):
    """Sum over the planes; a tile is (channels, slots) if turned, else (slots, channels)."""
    scores = None
    for rows, (tile, turned) in zip(queries, tiles, strict=True):
        product = dot(rows, tile, not turned)
        scores = product if scores is None else scores + product
    assert scores is not None, "an operand has one plane or more"
    return scores


def _seen(spots, places, inside, window: int | None, shape):
    """Which slots each row sees."""
    seen = None
    if spots is not None and places is not None:
        age = spots[:, None] - places[None, :]
        seen = (places[None, :] >= 0) & (age >= 0)
        seen = seen if window is None else seen & (age < window)
    if inside is not None:
        seen = inside[None, :] if seen is None else seen & inside[None, :]
    return jnp.full(shape, True) if seen is None else across(seen, shape)


def _capped(scores, call: Facts):
    scores = scores * call.scale
    if call.softcap is None:
        return scores
    # tanh x = 1 - 2 / (e^(2x) + 1), right at both infinities.
    return call.softcap * (1.0 - 2.0 / (jnp.exp2(scores * (2 * LOG2E / call.softcap)) + 1.0))


def _scale(ref, start, block: int, inside):
    """Scale of each slot, or of the head."""
    if ref.shape[-1] == 1:
        return ref[0]
    return load(ref, (pl.ds(start, block),), inside, 0.0)[None, :]
