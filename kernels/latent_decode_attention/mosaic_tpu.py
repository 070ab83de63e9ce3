"""Latent decode attention on a TPU: blocks of slots stream through VMEM once, softmax and output stay there.

Rows with slots last are what a TPU stores without padding: any width of 8 sublanes or more fills whole tiles, where a
width of 576 or 48 as the last axis would be padded to the next 128 lanes. Codes are never decoded: as whole numbers up
to 255 they are exact in bfloat16, and a run's scale and minimum move out of both products,

    q . (c s + m) = s (q . c) + m sum(q),        sum_j p_j (c_j s_j + m_j) = (p s) . c + sum_j p_j m_j.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvx.kernels.checks import dtype_refusal
from kvx.kernels.implementations import LANES
from kvx.kernels.latent_decode_attention.operands import CodedRows, Rows, capacity, dtypes, width
from kvx.kernels.logits import capped, visible
from kvx.kernels.merge_partials import Partial
from kvx.kernels.quantize_pack.coded import range_minimum, range_scale

LOWEST = -1e30
"""Below every logit, and finite: the running maximum of a row that has seen nothing yet."""

TILE_BYTES = 2**21
"""Rows fetched a step: enough that the step's fixed cost (0.35 us) is small beside its transfer."""

QUERY_ROWS = 256
"""Query rows that share one pass over the cache."""


@dataclass(frozen=True)
class Tuning:
    """Slots a step, a multiple of 128."""

    slots: int


CANDIDATES = tuple(Tuning(slots) for slots in (512, 1024, 2048, 4096))


def refusal(queries: Float[Array, "B T H D"], rows: Rows, value_dim: int, slots_last: bool, tuning: Any) -> str | None:
    """Why these arguments cannot run."""
    if isinstance(rows, CodedRows) and not slots_last:
        return "coded rows need slots_last=True, since their few rotary channels would be padded to 128 lanes"
    if isinstance(rows, CodedRows) and rows.codes.bits != 8:
        return f"codes have {rows.codes.bits} bits, it takes 8"
    if isinstance(rows, CodedRows) and rows.rotary.shape[1] == 0:
        return "coded rows need at least one rotary channel"
    if not slots_last and width(rows, slots_last) % 128:
        return (
            f"rows have {width(rows, slots_last)} channels along the lanes, it takes multiples of 128 or "
            "slots_last=True: otherwise XLA copies the cache into padded lanes at every call"
        )
    if tuning is not None and (not isinstance(tuning, Tuning) or tuning.slots % 128):
        return f"tuning is {tuning}, it takes its own Tuning with slots a multiple of 128"
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
    slots = capacity(rows, slots_last)
    coded = isinstance(rows, CodedRows)
    matrix = _query_rows(queries)
    row_block = min(matrix.shape[1], QUERY_ROWS)
    block = _slot_block(rows, slots, row_block, tuning)
    # With slots in order, what lies beyond the last query is not even fetched.
    reach = jnp.full(batch, slots) if key_positions is not None else jnp.max(query_positions, axis=1) + 1
    reach = jnp.clip(reach, 0, slots).astype(jnp.int32)

    def needed(b, j, reach):
        return jnp.minimum(j, jnp.maximum(pl.cdiv(reach[b], block) - 1, 0))

    def by_rows(channels):
        return pl.BlockSpec((None, row_block, channels), lambda b, m, j, *_: (b, m, 0))

    def by_slots(channels, last=True):
        if last:
            return pl.BlockSpec((None, channels, block), lambda b, m, j, reach, _: (b, 0, needed(b, j, reach)))
        return pl.BlockSpec((None, block, channels), lambda b, m, j, reach, _: (b, needed(b, j, reach), 0))

    held = (rows.rotary, rows.codes.words[:, 0], rows.codes.ranges[:, 0]) if coded else (rows,)
    acc_width = value_dim if coded else dim
    row_axis = 1 if slots_last else 2
    out, lse = pl.pallas_call(
        partial(
            _kernel,
            block=block,
            slots=slots,
            heads=heads,
            length=length,
            scale=scale,
            window=window,
            softcap=softcap,
            slots_last=slots_last,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, matrix.shape[1] // row_block, pl.cdiv(slots, block)),
            in_specs=[
                by_rows(dim),
                None if key_positions is None else by_slots(1),
                None if bias is None else by_slots(1),
                tuple(by_slots(array.shape[row_axis], slots_last) for array in held),
            ],
            out_specs=[by_rows(value_dim), pl.BlockSpec((None, 1, row_block), lambda b, m, j, *_: (b, 0, m))],
            scratch_shapes=[
                pltpu.VMEM((row_block, 1), jnp.float32),
                pltpu.VMEM((row_block, 1), jnp.float32),
                pltpu.VMEM((row_block, acc_width), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*matrix.shape[:2], value_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, 1, matrix.shape[1]), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="latent_decode_attention",
    )(
        reach,
        query_positions.astype(jnp.int32).reshape(-1),
        matrix,
        None if key_positions is None else key_positions[:, None],
        None if bias is None else bias.astype(jnp.float32)[:, None],
        held,
    )
    return Partial(
        out=out[:, : heads * length].reshape(batch, length, heads, value_dim),
        lse=lse[:, 0, : heads * length].reshape(batch, length, heads),
    )


def _query_rows(queries: Float[Array, "B T H D"]) -> Float[Array, "B M D"]:
    """All heads' queries as the rows of one matrix, padded to whole tiles of rows."""
    batch, length, heads, dim = queries.shape
    count = heads * length
    padding = -count % (16 if count <= QUERY_ROWS else QUERY_ROWS)
    return jnp.pad(queries.reshape(batch, count, dim), ((0, 0), (0, padding), (0, 0)))


def _slot_block(rows: Rows, slots: int, row_block: int, tuning: Tuning | None) -> int:
    """Slots a step: a power of two that divides the capacity if there is one, else the last step is masked."""
    if slots <= 128:
        return slots
    if tuning is not None:
        return min(tuning.slots, -(-slots // 128) * 128)
    row_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(rows)) // (slots * jax.tree.leaves(rows)[0].shape[0])
    most = max(min(TILE_BYTES // max(row_bytes, 1), TILE_BYTES // (4 * row_block), 8192), 256)
    block = 128
    while 2 * block <= most and block < slots:
        block *= 2
    dividing = [size for size in (block, block // 2, block // 4) if size >= 128 and slots % size == 0]
    return dividing[0] if dividing else block


def _dot(a, b, contracted):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = ((contracted[:1], contracted[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _kernel(
    reach_ref,
    positions_ref,
    queries,
    places_ref,
    bias_ref,
    held,
    out_ref,
    lse_ref,
    top_ref,
    total_ref,
    acc_ref,
    *,
    block,
    slots,
    heads,
    length,
    scale,
    window,
    softcap,
    slots_last,
):
    b, m, step = (pl.program_id(axis) for axis in range(3))
    first = step * block

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(first < reach_ref[b])
    def _():
        index = first + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        places = index if places_ref is None else places_ref[...]
        inside = index < slots if slots % block else None
        asked = queries[...]
        if len(held) == 1:
            scores, mix = _plain(asked, held[0][...], inside, slots_last)
        else:
            rotary, words, ranges = (ref[...] for ref in held)
            turned = rotary.shape[0]
            scores, mix = _coded(asked[:, :turned], asked[:, turned:], rotary, words, ranges, inside)
        scores = capped(scale * scores, softcap)
        scores = scores if bias_ref is None else scores + bias_ref[...]
        row = m * scores.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (scores.shape[0], 1), 0)
        # A row of each head at each of a few positions, which are scalars; rows behind them see nothing.
        spots = jnp.full_like(row, -1)
        for at in range(length):
            spots = jnp.where(jax.lax.div(row, heads) == at, positions_ref[b * length + at], spots)
        seen = visible(spots, places, window)
        scores = jnp.where(seen if inside is None else seen & inside, scores, -jnp.inf)
        before = top_ref[...]
        top = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - top)
        shrink = jnp.exp(before - top)
        top_ref[...] = top
        total_ref[...] = shrink * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        mix(weights, shrink, acc_ref)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        total = total_ref[...]
        divisor = jnp.where(total > 0, total, 1.0)
        acc = acc_ref[...]
        out_ref[...] = acc[:, acc.shape[1] - out_ref.shape[1] :] / divisor
        found = jnp.where(total > 0, top_ref[...] + jnp.log(divisor), -jnp.inf)
        # A column leaves as a row: columns are filled up to whole lanes in memory.
        lse_ref[...] = jnp.broadcast_to(found, (found.shape[0], LANES)).T[:1]


def _plain(queries, tile, inside, slots_last):
    """Logits of one block, and what adds its rows to the output: whole rows, of which the end keeps the latent."""
    dtype = jnp.promote_types(queries.dtype, tile.dtype)
    queries, tile = queries.astype(dtype), tile.astype(dtype)
    if inside is not None:
        # Beyond the last slot lies anything, nan included, which no weight of zero takes away.
        tile = jnp.where(inside if slots_last else inside.reshape(-1, 1), tile, jnp.zeros_like(tile))
    channel, slot = (0, 1) if slots_last else (1, 0)

    def mix(weights, shrink, acc_ref):
        acc_ref[...] = shrink * acc_ref[...] + _dot(weights.astype(dtype), tile, (1, slot))

    return _dot(queries, tile, (1, channel)), mix


def _coded(queries_rotary, queries_latent, rotary, words, ranges, inside):
    """The same of codes, run by run."""
    # Products in 16 bits only if queries are, too; the codes are exact in either.
    dtype = jnp.promote_types(queries_latent.dtype, rotary.dtype)
    if inside is not None:
        rotary = jnp.where(inside, rotary, jnp.zeros_like(rotary))
        ranges = jnp.where(inside, ranges, jnp.zeros_like(ranges))
    scale, minimum = range_scale(ranges), range_minimum(ranges)
    # The bytes of a word lie one below the other in a register, as the codes of a slot do.
    codes = pltpu.bitcast(words, jnp.uint8).astype(jnp.int32).astype(jnp.float32).astype(dtype)
    runs = scale.shape[0]
    run = codes.shape[0] // runs
    scores = _dot(queries_rotary.astype(dtype), rotary.astype(dtype), (1, 0))
    for index in range(runs):
        part = slice(index * run, (index + 1) * run)
        asked = queries_latent[:, part].astype(dtype)
        total = jnp.sum(asked.astype(jnp.float32), axis=1, keepdims=True)
        product = _dot(asked, codes[part], (1, 0))
        scores = scores + product * scale[index : index + 1] + total * minimum[index : index + 1]

    def mix(weights, shrink, acc_ref):
        for index in range(runs):
            part = slice(index * run, (index + 1) * run)
            scaled = (weights * scale[index : index + 1]).astype(dtype)
            constant = jnp.sum(weights * minimum[index : index + 1], axis=1, keepdims=True)
            acc_ref[:, part] = shrink * acc_ref[:, part] + _dot(scaled, codes[part], (1, 1)) + constant

    return scores, mix
