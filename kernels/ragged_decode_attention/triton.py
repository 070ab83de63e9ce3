"""Attention over listed rows on a GPU: one program a list and a split of its slots, then one a query to merge them.

A decode step is bound by memory: a program loads blocks of whole rows at the addresses that the list gives, with as
many blocks on their way as `stages` says, and holds its softmax in registers. Splits are of equal size, so that a long
list brings more programs, not longer ones; a program whose split lies beyond its list's end leaves at once.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kvx.kernels.checks import dtype_refusal, triton_refusal
from kvx.kernels.logits import capped
from kvx.kernels.merge_partials import Partial
from kvx.kernels.ragged_decode_attention.reads import Reads

LOWEST = -1e30
"""A finite stand-in for the logit of what is not seen: -inf - -inf is nan."""

MERGED = 16
"""Splits that are merged at a time."""

PROGRAMS = 1056
"""What splits aim at: eight a multiprocessor of an H100."""


@dataclass(frozen=True)
class Tuning:
    """How the work is cut.

    Attributes:
        block: slots loaded at a time.
        split: slots a program; None: by the call's shape.
        rows: queries a program; None: 16, or as many as there are up to 64.
        warps, stages: Triton's.
        interpret: run in Pallas' interpreter, on any platform.
    """

    block: int = 64
    split: int | None = None
    rows: int | None = None
    warps: int = 4
    stages: int = 3
    interpret: bool = False


CANDIDATES = tuple(
    Tuning(block=block, split=split, warps=warps, stages=stages)
    for block, warps, stages in ((32, 2, 4), (32, 4, 4), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3), (128, 8, 3))
    for split in (None, 512, 1024, 2048)
)
"""What a benchmark tries."""


def refusal(reads: Reads) -> str | None:
    """Why this implementation cannot take these arguments."""
    if reason := triton_refusal():
        return reason
    for name, width in (("D", reads.queries.shape[-1]), ("V", reads.value_dim)):
        if width < 16 or width & (width - 1):
            return f"{name} is {width}, allowed are powers of two from 16 up"
    return dtype_refusal({"queries": reads.queries.dtype, "keys": reads.keys.dtype})


def attend(reads: Reads, scale: float, window: int | None, softcap: float | None, tuning: Tuning = Tuning()) -> Partial:
    """out (L, M, V) and lse (L, M)."""
    from jax.experimental.pallas import triton as plgpu

    lists, many, _ = reads.queries.shape
    rows = tuning.rows or min(max(16, pl.next_power_of_2(many)), 64)
    split = tuning.split or _split(reads)
    splits = max(pl.cdiv(reads.longest, split), 1)
    tuning = replace(tuning, rows=rows, split=split)
    operands = {
        "queries": reads.queries,
        "lengths": reads.lengths,
        "keys": reads.keys,
        "values": reads.values,
        "starts": reads.starts,
        "table": reads.table,
        "query_positions": reads.query_positions if reads.key_positions is not None else None,
        "key_positions": None if reads.key_positions is None else reads.key_positions.reshape(-1),
    }
    operands = {name: array for name, array in operands.items() if array is not None}
    params = plgpu.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages)
    body = partial(
        _attend,
        names=tuple(operands),
        page=reads.page,
        value_dim=reads.value_dim,
        scale=scale,
        window=window,
        softcap=softcap,
        tuning=tuning,
    )
    out, lse = pl.pallas_call(
        body,
        grid=(lists, splits, pl.cdiv(many, rows)),
        out_shape=(
            jax.ShapeDtypeStruct((lists, splits, many, reads.value_dim), jnp.float32),
            jax.ShapeDtypeStruct((lists, splits, many), jnp.float32),
        ),
        compiler_params=params,
        interpret=tuning.interpret,
        name="ragged_decode_attention",
    )(*operands.values())
    if splits == 1:
        return Partial(out[:, 0], lse[:, 0])
    merged, lse = pl.pallas_call(
        partial(_merge, split=split),
        grid=(lists, many),
        out_shape=(
            jax.ShapeDtypeStruct((lists, many, reads.value_dim), jnp.float32),
            jax.ShapeDtypeStruct((lists, many), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=tuning.interpret,
        name="ragged_decode_attention_merge",
    )(reads.lengths, out, lse)
    return Partial(merged, lse)


def _split(reads: Reads) -> int:
    """Slots a program, so that the slots that there can be fill the chip several times over."""
    slots = min(len(reads.lengths) * reads.longest, max(reads.keys.shape[0], 1))
    return min(max(pl.next_power_of_2(pl.cdiv(slots, PROGRAMS)), 256), 4096)


def _attend(
    *refs: Any,
    names: tuple[str, ...],
    page: int,
    value_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    tuning: Any,
) -> None:
    from jax.experimental.pallas import triton as plgpu

    given = dict(zip(names, refs[: len(names)], strict=True))
    out_ref, lse_ref = refs[len(names) :]
    queries_ref, keys_ref = given["queries"], given["keys"]
    one, split, tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    many, dim = queries_ref.shape[1:]
    block, rows = tuning.block, tuning.rows
    begin = split * tuning.split
    end = jnp.minimum(begin + tuning.split, given["lengths"][one])
    at = pl.ds(tile * rows, rows)
    mine = tile * rows + jnp.arange(rows) < many
    dtype = jnp.promote_types(queries_ref.dtype, keys_ref.dtype)
    queries = plgpu.load(queries_ref.at[one, at, :], mask=mine[:, None], other=0.0).astype(dtype)
    if "key_positions" in given:
        query_positions = plgpu.load(given["query_positions"].at[one, at], mask=mine, other=-1)

    def turn(step: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        top, total, mean = carry
        slots = begin + step * block + jnp.arange(block)
        held = slots < end
        if "table" in given:
            pages = plgpu.load(given["table"].at[one, lax.div(slots, jnp.int32(page))], mask=held, other=0)
            held = held & (pages >= 0)
            row = pages * page + lax.rem(slots, jnp.int32(page))
        else:
            row = given["starts"][one] + slots
        keys = plgpu.load(keys_ref.at[_channels(row, 0, dim)], mask=held[:, None], other=0.0)
        values_ref = given.get("values", keys_ref)
        first = values_ref.shape[1] - value_dim
        values = plgpu.load(values_ref.at[_channels(row, first, value_dim)], mask=held[:, None], other=0.0)
        logits = capped(scale * _dot(queries, keys.astype(dtype), 1), softcap)
        seen = jnp.broadcast_to(held[None, :], logits.shape)
        if "key_positions" in given:
            positions = plgpu.load(given["key_positions"].at[row], mask=held, other=-1)
            seen = (positions >= 0)[None, :] & (positions[None, :] <= query_positions[:, None])
            if window is not None:
                seen = seen & (query_positions[:, None] - positions[None, :] < window)
            # An empty slot may hold anything, and 0 * nan is nan.
            values = jnp.where((positions >= 0)[:, None], values, jnp.zeros_like(values))
        logits = jnp.where(seen, logits, LOWEST)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.where(seen, jnp.exp(logits - higher[:, None]), 0.0)
        kept = jnp.exp(top - higher)
        mean = mean * kept[:, None] + _dot(weights.astype(values.dtype), values, 0)
        return higher, total * kept + jnp.sum(weights, axis=1), mean

    nothing = (
        jnp.full((rows,), LOWEST, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, value_dim), jnp.float32),
    )
    turns = lax.div(jnp.maximum(end - begin, 0) + (block - 1), jnp.int32(block))
    top, total, mean = lax.fori_loop(0, turns, turn, nothing)
    divisor = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log(divisor), -jnp.inf)
    plgpu.store(lse_ref.at[one, split, at], lse, mask=mine)

    # What no merge reads need not be written: with heads of very different length most splits are empty.
    @pl.when((turns > 0) | (split == 0))
    def _() -> None:
        plgpu.store(out_ref.at[one, split, at, :], mean / divisor[:, None], mask=mine[:, None])


def _merge(lengths_ref: Any, parts_ref: Any, part_lse_ref: Any, out_ref: Any, lse_ref: Any, *, split: int) -> None:
    from jax.experimental.pallas import triton as plgpu

    one, row = pl.program_id(0), pl.program_id(1)
    width = parts_ref.shape[-1]
    splits = lax.div(lengths_ref[one] + (split - 1), jnp.int32(split))

    def turn(step: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        top, total, mean = carry
        some = pl.ds(step * MERGED, MERGED)
        held = step * MERGED + jnp.arange(MERGED) < splits
        lse = plgpu.load(part_lse_ref.at[one, some, row], mask=held, other=-jnp.inf)
        part = plgpu.load(parts_ref.at[one, some, row, :], mask=held[:, None], other=0.0)
        lse = jnp.maximum(lse, LOWEST)
        higher = jnp.maximum(top, jnp.max(lse, axis=0))
        weights = jnp.where(lse > LOWEST, jnp.exp(lse - higher), 0.0)
        kept = jnp.exp(top - higher)
        return higher, total * kept + jnp.sum(weights, axis=0), mean * kept + jnp.sum(weights[:, None] * part, axis=0)

    nothing = (jnp.float32(LOWEST), jnp.float32(0.0), jnp.zeros((width,), jnp.float32))
    top, total, mean = lax.fori_loop(0, lax.div(splits + (MERGED - 1), jnp.int32(MERGED)), turn, nothing)
    divisor = jnp.where(total > 0, total, 1.0)
    out_ref[one, row, :] = mean / divisor
    lse_ref[one, row] = jnp.where(total > 0, top + jnp.log(divisor), -jnp.inf)


def _channels(row: Any, first: int, width: int) -> tuple[Any, Any]:
    """Index of some channels of some rows."""
    shape = (row.shape[0], width)
    return jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(first + jnp.arange(width)[None], shape)


def _dot(left: Any, right: Any, contract: int) -> Any:
    """left (m, k) times right, contracted over its axis `contract`, float32; no tf32 where the operands are float32."""
    dims = (((1,), (contract,)), ((), ()))
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)
