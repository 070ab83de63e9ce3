"""Decode attention on GPUs by Pallas-Triton: a program per row, KV head and split of the slots, merged by another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kvx.kernels.checks import dtype_refusal, triton_refusal
from kvx.kernels.decode_attention.call import Call, Found, with_tail_logits
from kvx.kernels.decode_attention.operands import Operand, Rows
from kvx.kernels.decode_attention.triton_kernel import LOG2E, UNSEEN, Facts, kernel
from kvx.kernels.decode_attention.triton_tiles import ROWS, Layout
from kvx.kernels.merge_partials import Partial
from kvx.kernels.quantize_pack.coded import ChannelCodes


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; the results are the same up to rounding.

    Attributes:
        block: slots of one turn of the loop, a power of 2 from 16 up; with per-channel keys at most their group.
        splits: programs a row and KV head, a power of 2; None: enough to fill the chip several times over.
        num_warps: of a program.
        num_stages: blocks in flight.
        packed: decode codes of 2 and 4 bits two at a time by instructions of their own; for bfloat16 queries.
        interpret: run as plain JAX, on any platform.
    """

    block: int = 64
    splits: int | None = None
    num_warps: int = 4
    num_stages: int = 3
    packed: bool = False
    interpret: bool = False


CANDIDATES = (
    *(Tuning(64, None, warps, stages) for warps, stages in ((4, 2), (4, 3), (4, 4), (1, 2))),
    *(Tuning(128, None, warps, stages) for warps, stages in ((4, 2), (8, 3))),
    *(Tuning(32, None, 1, stages, packed=True) for stages in (2, 3, 4)),
    *(Tuning(64, None, warps, stages, packed=True) for warps, stages in ((1, 2), (1, 3), (2, 3), (4, 3))),
    *(Tuning(64, splits, 1, 2, packed=True) for splits in (32, 64)),
)
"""What a benchmark tries beside the default."""

LONGEST_RUN = 16
"""Queries a row that a program takes at once."""

PROGRAMS = 1024
"""Programs that fill a chip of 132 multiprocessors several times over."""


def default_tuning(call: Call) -> Tuning:
    """By kind of operand and number of heads."""
    batch, heads = call.queries.shape[:2]
    # A plane is too narrow for several warps: they would all take apart the same codes.
    coded = not (isinstance(call.keys, Rows) and isinstance(call.values, Rows))
    tuning = Tuning(num_warps=1, num_stages=2, packed=True) if coded else Tuning()
    blocks = pl.cdiv(call.keys.slots, tuning.block)
    wanted = min(max(PROGRAMS // (batch * heads), 1), max(blocks // 4, 1), 64)
    return replace(tuning, splits=1 << (wanted.bit_length() - 1))


def refusal(call: Call) -> str | None:
    """Why the kernel cannot take the call; None if it can."""
    if reason := triton_refusal():
        return reason
    if call.length > LONGEST_RUN:
        return f"queries has {call.length} tokens a row, the kernel takes up to {LONGEST_RUN}"
    if reason := dtype_refusal({"queries": call.queries.dtype}):
        return reason
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
    assert splits is not None, "the default names a number"
    batch, heads, rows, _ = call.queries.shape
    slots, width = call.keys.slots, call.values.width
    inputs, specs = _inputs(call)
    shapes = {"out": ((splits, rows, width), jnp.float32), "lse": ((splits, rows), jnp.float32)}
    if call.logits:
        shapes["logits"] = ((rows, slots), jnp.float32)
    found = pl.pallas_call(
        partial(kernel, call=Facts.of(call, tuning.block, splits, tuning.packed)),
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
    arrays, shifts = {"queries": call.queries}, {}
    for name, operand in (("keys", call.keys), ("values", call.values)):
        if isinstance(operand, Rows):
            arrays[name] = operand.array
            if operand.scale is not None:
                arrays[f"{name}_scale"] = operand.scale[:, :, 0]
        else:
            arrays |= {name: operand.words, f"{name}_ranges": operand.ranges}
            shifts[f"{name}_shifts"] = Layout.of(operand).shifts()
    arrays |= {name: array for name, array in (("slots", call.slots), ("bias", call.bias)) if array is not None}
    if call.tail is not None:
        arrays |= {f"tail_{name}": getattr(call.tail, name) for name in ("keys", "values", "positions")}
    specs = {name: _whole(array.shape[2:]) for name, array in arrays.items()}
    arrays |= shifts
    specs |= {name: pl.BlockSpec(each.shape, lambda split, head, row: (0,)) for name, each in shifts.items()}
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


def _merged(out: jax.Array, lse: jax.Array, tuning: Tuning) -> Partial:
    """Partials (B, G, splits, Q, V) merged by log-sum-exp, one program a query row."""
    batch, heads, splits, rows, width = out.shape

    def merge(out_ref, lse_ref, merged_ref, total_ref):
        found = lse_ref[...]
        top = jnp.maximum(jnp.max(found, axis=0), UNSEEN)
        weights = jnp.exp2((found - top) * LOG2E)
        total = jnp.sum(weights, axis=0)
        divisor = jnp.where(total > 0, total, 1.0)
        merged_ref[...] = jnp.sum(out_ref[...] * weights[:, None], axis=0) / divisor
        total_ref[0] = jnp.where(total > 0, top + jnp.log2(divisor) / LOG2E, -jnp.inf)

    merged, total = pl.pallas_call(
        merge,
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
