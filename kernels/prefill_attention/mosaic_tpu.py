"""Prefill attention on TPUs: a flash pass for output and log-sum-exp, and a pass over keys for the statistics.

JAX's splash attention does not serve: its masks are static while positions are data, and it writes the log-sum-exp 128
times. Both kernels hold logits with keys along sublanes and queries along lanes: sums over keys are then additions of
registers, and what belongs to a query (log-sum-exp, position, vote) is a compact row in main memory.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.implementations import LANES
from kvx.kernels.prefill_attention.columns import Column, votes_and_widths
from kvx.kernels.prefill_attention.gradient import Result
from kvx.kernels.prefill_attention.reach import lengthened, reaches, reaches_in_order

DTYPES = (jnp.bfloat16, jnp.float32)


@dataclass(frozen=True)
class Tuning:
    """Tokens of a block of queries and of keys, multiples of 128; shorter where the arrays are."""

    query_block: int = 512
    key_block: int = 512


def refusal(queries: Array, keys: Array, values: Array, visibility: Any) -> str | None:
    """Why these arguments cannot be taken, if they cannot."""
    if visibility is not None:
        return "visibility is a table, and it takes None: labels that see their own and SHARED"
    for name, array in (("queries", queries), ("keys", keys), ("values", values)):
        if array.shape[-1] % 64 or array.shape[-1] > 256:
            return f"{name} have {array.shape[-1]} channels, and it takes 64, 128, 192 or 256"
        if array.dtype not in DTYPES or array.dtype != queries.dtype:
            return f"{name} are {array.dtype}, and it takes bfloat16 or float32, the same for all three"
    return None


def prefill_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G S D"],
    values: Float[Array, "B G S V"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    columns: tuple[Column, ...] = (),
    lengths: Int[Array, "B"] | None = None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    visibility: None = None,
    tuning: Tuning | None = None,
) -> Result:
    """See `kvx.kernels.prefill_attention.prefill_attention`."""
    from kvx.kernels.prefill_attention.mosaic_tpu_columns import statistics
    from kvx.kernels.prefill_attention.mosaic_tpu_forward import forward

    length, total = queries.shape[3], keys.shape[2]
    tuning = tuning or Tuning()
    blocks = _fitting(tuning.query_block, length), _fitting(tuning.key_block, total)
    ordered = segments is None and window is None and length == total
    if ordered:
        # A whole prompt stays square when it is filled up to blocks.
        blocks = (min(blocks),) * 2
    padded_length, padded_total = (size + -size % block for size, block in zip((length, total), blocks, strict=True))
    queries = lengthened(queries, 3, padded_length, 0)
    keys, values = (lengthened(array, 2, padded_total, 0) for array in (keys, values))
    query_positions = lengthened(query_positions, 1, padded_length, -1)
    key_positions = lengthened(key_positions, 2, padded_total, -1)
    if segments is not None:
        segments = lengthened(segments[0], 1, padded_length, 0), lengthened(segments[1], 1, padded_total, 0)
    if ordered:
        runs = reaches_in_order(query_positions, key_positions, *blocks)
    else:
        runs = reaches(query_positions, key_positions, segments, window, *blocks)
    shared = {"scale": scale, "window": window, "softcap": softcap, "blocks": blocks}
    operands = query_positions, key_positions, segments
    out, lse = forward(runs[0], queries, keys, values, *operands, **shared)
    found = {}
    for pooled in (False, True):
        some = tuple(column for column in columns if column.pooled is pooled)
        if some:
            votes, widths = votes_and_widths(some, query_positions, lengths)
            arrays = statistics(runs[1], queries, keys, lse, *operands, votes, widths, columns=some, **shared)
            found |= {column: array[..., :total] for column, array in zip(some, arrays, strict=True)}
    return out[:, :, :, :length], lse[:, :, :, :length], {column: found[column] for column in columns}


def _fitting(block: int, size: int) -> int:
    """The largest multiple of the lanes up to `block` that fills up `size` the least."""
    whole = size + -size % LANES
    return max(each for each in range(LANES, max(block, LANES) + 1, LANES) if whole % each == 0)
