"""Attention of a few queries over latent rows (MLA's absorbed form): one row a slot, read once as key and as value."""

from functools import partial
from importlib import import_module
from typing import Any

from jaxtyping import Array, Float, Int

from kvx.kernels.checks import check_masking, check_shape
from kvx.kernels.implementations import KERNELS, choose
from kvx.kernels.latent_decode_attention.operands import CodedRows, Rows, capacity, width
from kvx.kernels.merge_partials import Partial
from kvx.kernels.over_mesh import HEADS, ROWS, WHOLE, over_mesh

__all__ = ["CodedRows", "latent_decode_attention"]

NAMES = ("reference", "xla", "mosaic_tpu", "triton")
"""Implementations: one file each, loaded when it is first asked for."""


def latent_decode_attention(
    queries: Float[Array, "B T H D"],
    rows: Rows,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B C"] | None = None,
    bias: Float[Array, "B C"] | None = None,
    *,
    value_dim: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slots_last: bool = False,
    implementation: str | None = None,
    tuning: Any = None,
) -> Partial:
    """Partial softmax over the slots of p_j = softmax_j(scale q . row_j), of the last `value_dim` channels of row_j.

    DeepSeek-V2 (2024), section 2.1, with the up-projections absorbed into queries and output: all H heads share one
    row of D = P + V channels, the rotary key first and the latent last. See the sheet's formula: score = s (a . c + q_p
    . k_p), z = sum_j p_j c_j.

    Args:
        queries: rotated rotary part and absorbed content part; float32 or bfloat16.
        rows: (B, C, D), or (B, D, C) with `slots_last`; float32, bfloat16 or `CodedRows`. On a TPU slots last costs
            nothing; a width that is no multiple of 128 would be padded, and the whole cache copied for it.
        query_positions: true positions; -1 sees nothing.
        key_positions: true positions by slot, -1 where empty; None: slot i holds the token at position i, so that a
            query at position p sees the first p + 1 slots and no more of the cache is read.
        bias: log weight added to each slot's logit.
        value_dim: V.
        scale, window, softcap: as in `kvx.decoder.AttentionSpec`.
        slots_last: the layout of `rows`.
        implementation: "reference", "xla", "mosaic_tpu", "triton", or None, which picks by platform.
        tuning: block sizes of the named implementation (its `Tuning`); None: chosen by shape.

    Returns:
        out (B, T, H, V) and natural log-sum-exp (B, T, H), float32; (0, -inf) where nothing is seen.

    Raises:
        ValueError: widths or slots that do not fit together, or arguments the named implementation cannot take.
    """
    _check(queries, rows, value_dim, slots_last)
    batch, slots = len(queries), capacity(rows, slots_last)
    check_shape("query_positions", query_positions, queries.shape[:2])
    check_shape("key_positions", key_positions, (batch, slots))
    check_shape("bias", bias, (batch, slots))
    check_masking(window, softcap)

    def refusal(name: str) -> str | None:
        if name not in KERNELS:
            return None
        return _module(name).refusal(queries, rows, value_dim, slots_last, tuning)

    offered = {name: partial(_attend, name) for name in NAMES}
    attend = choose("latent_decode_attention", implementation, offered, refusal)
    return attend(
        queries,
        rows,
        query_positions,
        key_positions,
        bias,
        value_dim=value_dim,
        scale=scale,
        window=window,
        softcap=softcap,
        slots_last=slots_last,
        tuning=tuning,
    )


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def _attend(name: str, *arrays: Any, **options: Any) -> Partial:
    attend = partial(_module(name).latent_decode_attention, **options)
    if name not in KERNELS:
        return attend(*arrays)
    return over_mesh(attend, [ROWS + WHOLE + HEADS, *ROWS * 4], ROWS + WHOLE + HEADS)(*arrays)


def _check(
    queries: Float[Array, "B T H D"],
    rows: Rows,
    value_dim: int,
    slots_last: bool,
) -> None:
    check_shape("queries", queries, (None,) * 4)
    check_shape("rows", rows.rotary if isinstance(rows, CodedRows) else rows, (len(queries), None, None))
    row, slots = width(rows, slots_last), capacity(rows, slots_last)
    if queries.shape[-1] != row:
        raise ValueError(f"queries have {queries.shape[-1]} channels, allowed: the {row} of rows")
    if not 0 < value_dim <= row:
        raise ValueError(f"value_dim is {value_dim}, allowed: 1 to the {row} channels of rows")
    if isinstance(rows, CodedRows):
        if value_dim != rows.channels:
            raise ValueError(f"value_dim is {value_dim}, allowed with coded rows: their {rows.channels} coded channels")
        check_shape("codes.words", rows.codes.words, (len(queries), 1, None, slots))
        check_shape("codes.ranges", rows.codes.ranges, (len(queries), 1, None, slots))
        if rows.codes.lower is not None:
            raise ValueError("codes have lower codes, allowed: None, since nested codes are read by their own store")
