"""Latent decode attention on a GPU: programs by query rows and run of slots, each reading its rows once for both dots.

A tile of latents serves as keys and, the same registers again, as values. The programs of one run of slots stand next
to each other in the grid, so that with many heads the second reads what the first has left in the L2 cache. Runs merge
by log-sum-exp. Rows with slots first are what the compiler copies ahead into shared memory; with slots last it fetches
them through registers, so that a GPU's cache had better keep slots first.

Codes of a word lie in different lanes of no array: a tile of words gives as many tiles of latents as a word has codes,
each with every fourth (8 bits) channel. The queries are read by the same channels, and the outputs written by them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kvx.kernels.checks import dtype_refusal, triton_refusal
from kvx.kernels.latent_decode_attention.operands import CodedRows, Rows, capacity, dtypes
from kvx.kernels.logits import capped
from kvx.kernels.merge_partials import Partial, merge_axis
from kvx.kernels.quantize_pack.coded import range_minimum, range_scale

LOG2_E = 1.4426950408889634
LOWEST = -1e30
"""Below every logit, and finite: the running maximum of a row that has seen nothing yet."""

PROGRAMS = 264
"""Programs that fill an H100's 132 processors twice."""


@dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        rows: query rows of a program, a power of two from 16.
        slots: slots a step, a power of two from 16.
        warps, stages: of Triton.
        splits: runs of slots; None: as many as fill the device.
        interpret: run without a GPU, for tests.
    """

    rows: int = 16
    slots: int = 32
    warps: int = 4
    stages: int = 2
    splits: int | None = None
    interpret: bool = False


CANDIDATES = (
    *(Tuning(16, slots, warps, stages) for slots in (32, 64) for warps in (4, 8) for stages in (2, 3)),
    *(Tuning(32, slots, warps, 2) for slots in (32, 64) for warps in (4, 8)),
    *(Tuning(64, 32, warps, stages) for warps in (8, 16) for stages in (2, 3)),
)


def refusal(queries: Float[Array, "B T H D"], rows: Rows, value_dim: int, slots_last: bool, tuning: Any) -> str | None:
    """Why these arguments cannot run."""
    if tuning is not None and not isinstance(tuning, Tuning):
        return f"tuning is {tuning}, it takes its own Tuning"
    if reason := triton_refusal(interpreted=tuning is not None and tuning.interpret):
        return reason
    for size in () if tuning is None else (tuning.rows, tuning.slots):
        if size < 16 or size & (size - 1):
            return f"tuning has a block of {size}, it takes powers of two from 16"
    if isinstance(rows, CodedRows):
        if rows.codes.bits == 3:
            return "codes have 3 bits, it takes 2, 4 or 8"
        if rows.codes.group * rows.codes.bits % 32:
            return f"codes have groups of {rows.codes.group}, it takes those that fill 32-bit words"
    return dtype_refusal(dtypes(queries, rows))


def latent_decode_attention(
    queries: Float[Array, "B T H D"],
    rows: Rows,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B C"] | None,
    bias: Float[Array, "B C"] | None,
    *,
    value_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    slots_last: bool,
    tuning: Tuning | None = None,
) -> Partial:
    """See `kvx.kernels.latent_decode_attention.latent_decode_attention`."""
    batch, length, heads, dim = queries.shape
    count, slots = heads * length, capacity(rows, slots_last)
    tuning = tuning or _by_shape(count, jax.tree.leaves(rows)[0].dtype)
    row_blocks, steps = pl.cdiv(count, tuning.rows), pl.cdiv(slots, tuning.slots)
    splits = min(tuning.splits or max(PROGRAMS // (batch * row_blocks), 1), steps)
    coded = isinstance(rows, CodedRows)
    work = _Work(
        latent=value_dim,
        rotary=dim - value_dim,
        slots=slots,
        slots_last=slots_last,
        bits=rows.codes.bits if coded else None,
        group=rows.codes.group if coded else 0,
        count=count,
        lines=tuning.rows,
        block=tuning.slots,
        steps=pl.cdiv(steps, splits),
        scale=scale,
        window=window,
        softcap=softcap,
    )
    out, lse = pl.pallas_call(
        partial(_kernel, work=work),
        grid=(row_blocks, splits, batch),
        out_shape=[
            jax.ShapeDtypeStruct((splits, batch, count, value_dim), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, count), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages),
        interpret=tuning.interpret,
        name="latent_decode_attention",
    )(
        queries.reshape(batch, count, dim),
        jnp.repeat(query_positions, heads, axis=1).astype(jnp.int32),
        key_positions,
        None if bias is None else bias.astype(jnp.float32),
        (rows.rotary, rows.codes.words[:, 0], rows.codes.ranges[:, 0]) if coded else (rows,),
    )
    merged = merge_axis(Partial(out, lse))
    return Partial(
        out=merged.out.reshape(batch, length, heads, value_dim), lse=merged.lse.reshape(batch, length, heads)
    )


def _by_shape(count: int, dtype: jnp.dtype) -> Tuning:
    """Tiles and accumulators that stay in registers: at rank 512, the largest whose compiled code spills none."""
    rows = 16 if count <= 16 else 32 if count <= 32 else 64
    if dtype == jnp.float32:
        return Tuning(rows=min(rows, 32), slots=16, warps=8, stages=1)
    return Tuning(rows=rows, slots=64 if rows == 16 else 32, warps=8, stages=2)


@dataclass(frozen=True)
class _Work:
    """What is known before the kernel runs: the cache's layout, a program's share, the softmax's options.

    Attributes:
        latent, rotary, slots, slots_last: V, P, C and the layout of the rows.
        bits, group: of the codes; None and 0: there are none.
        count, lines: query rows, and those of a program.
        block, steps: slots a step, and steps of a program.
    """

    latent: int
    rotary: int
    slots: int
    slots_last: bool
    bits: int | None
    group: int
    count: int
    lines: int
    block: int
    steps: int
    scale: float
    window: int | None
    softcap: float | None

    @property
    def parts(self) -> int:
        """Tiles that the latents of a block come in: one, or one for each code of a word."""
        return 32 // self.bits if self.bits else 1

    def channels(self, part: int) -> tuple[jax.Array, jax.Array]:
        """Latent channels of a part, padded to what Triton takes, and which of them exist."""
        count = self.latent // self.parts
        index = jnp.arange(_padded(count))
        return index * self.parts + part, index < count

    def rows(self, ref, row, slots, channels, exist):
        """A tile of an array of rows, one slot to a line, zero where there is none."""
        kept = (slots < self.slots)[:, None] & exist[None, :]
        if self.slots_last:
            return plgpu.load(ref.at[row, channels[None, :], slots[:, None]], mask=kept, other=0)
        return plgpu.load(ref.at[row, slots[:, None], channels[None, :]], mask=kept, other=0)

    def latents(self, held, row, slots, dtype):
        """The latents of these slots, in as many tiles as there are parts."""
        if self.bits is None:
            channels, exist = self.channels(0)
            return [self.rows(held[0], row, slots, self.rotary + channels, exist).astype(dtype)]
        count = self.latent // self.parts
        index = jnp.arange(_padded(count))
        kept = (slots < self.slots)[:, None] & (index < count)[None, :]
        words = plgpu.load(held[1].at[row, index[None, :], slots[:, None]], mask=kept, other=0)
        run = index * self.parts // self.group
        ranges = plgpu.load(held[2].at[row, run[None, :], slots[:, None]], mask=kept, other=0)
        scale, minimum = range_scale(ranges), range_minimum(ranges)
        codes = (((words >> (self.bits * part)) & (2**self.bits - 1)).astype(jnp.int32) for part in range(self.parts))
        return [(code.astype(jnp.float32) * scale + minimum).astype(dtype) for code in codes]


def _padded(channels: int) -> int:
    """Triton's arrays are powers of two, and its dots at least 16 wide."""
    return max(pl.next_power_of_2(channels), 16)


def _dot(a, b, contracted):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _kernel(queries_ref, spots_ref, places_ref, bias_ref, held, out_ref, lse_ref, *, work):
    split, row = pl.program_id(1), pl.program_id(2)
    lines = pl.program_id(0) * work.lines + jnp.arange(work.lines)
    there = lines < work.count
    spots = plgpu.load(spots_ref.at[row, lines], mask=there, other=-1)
    # Products in 16 bits only if queries and rows both are.
    dtype = jnp.promote_types(queries_ref.dtype, held[0].dtype)

    def asked(channels, exist):
        kept = there[:, None] & exist[None, :]
        return plgpu.load(queries_ref.at[row, lines[:, None], channels[None, :]], mask=kept, other=0).astype(dtype)

    turned = jnp.arange(_padded(work.rotary))
    asked_rotary = asked(turned, turned < work.rotary) if work.rotary else None
    asked_latent = []
    for part in range(work.parts):
        channels, exist = work.channels(part)
        asked_latent.append(asked(work.rotary + channels, exist))

    def step(index, carry):
        top_before, total, accs = carry
        slots = (split * work.steps + index) * work.block + jnp.arange(work.block)
        inside = slots < work.slots
        scores = jnp.zeros((work.lines, work.block), jnp.float32)
        if asked_rotary is not None:
            rotary = work.rows(held[0], row, slots, turned, turned < work.rotary).astype(dtype)
            scores += _dot(asked_rotary, rotary, 1)
        latents = work.latents(held, row, slots, dtype)
        for query, tile in zip(asked_latent, latents, strict=True):
            scores += _dot(query, tile, 1)
        scores = capped(scores * work.scale, work.softcap)
        if bias_ref is not None:
            scores += plgpu.load(bias_ref.at[row, slots], mask=inside, other=0.0)[None, :]
        places = slots
        if places_ref is not None:
            places = plgpu.load(places_ref.at[row, slots], mask=inside, other=-1)
        seen = (inside & (places >= 0))[None, :] & (places[None, :] <= spots[:, None])
        if work.window is not None:
            seen &= spots[:, None] - places[None, :] < work.window
        scores = jnp.where(seen, scores * LOG2_E, -jnp.inf)
        top = jnp.maximum(top_before, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - top[:, None])
        shrink = jnp.exp2(top_before - top)
        total = shrink * total + jnp.sum(weights, axis=1)
        rounded = weights.astype(dtype)
        accs = [acc * shrink[:, None] + _dot(rounded, tile, 0) for acc, tile in zip(accs, latents, strict=True)]
        return top, total, accs

    reach = jnp.int32(work.slots)
    if places_ref is None:
        # With slots in order, what lies beyond the last query is not read.
        reach = jnp.minimum(jnp.max(spots) + 1, reach)
    remaining = jnp.maximum(reach - split * work.steps * work.block, 0)
    start = (
        jnp.full(work.lines, LOWEST, jnp.float32),
        jnp.zeros(work.lines, jnp.float32),
        [jnp.zeros((work.lines, _padded(work.latent // work.parts)), jnp.float32)] * work.parts,
    )
    top, total, accs = jax.lax.fori_loop(0, jnp.minimum(pl.cdiv(remaining, work.block), work.steps), step, start)
    divisor = jnp.where(total > 0, total, 1.0)
    for part, acc in enumerate(accs):
        channels, exist = work.channels(part)
        where = out_ref.at[split, row, lines[:, None], channels[None, :]]
        plgpu.store(where, acc / divisor[:, None], mask=there[:, None] & exist[None, :])
    lse = jnp.where(total > 0, (top + jnp.log2(divisor)) / LOG2_E, -jnp.inf)
    plgpu.store(lse_ref.at[split, row, lines], lse, mask=there)
