"""Causal attention over a prompt that also reports what it saw: log-sum-exp and column statistics, never S x S."""

from collections.abc import Callable
from math import inf
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from kvx.kernels.checks import check_masking, check_shape
from kvx.kernels.implementations import choose
from kvx.kernels.over_mesh import KV_HEADS, ROWS, over_mesh
from kvx.kernels.prefill_attention import mosaic_tpu, reference, triton, xla, xla_backward
from kvx.kernels.prefill_attention.columns import Column
from kvx.kernels.prefill_attention.gradient import Call, Result, Sight, differentiable, remember


def _split(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """The kernel over a mesh."""

    def split(queries, keys, values, query_positions, key_positions, *, lengths, segments, visibility, **options):
        def own(*arrays: Any) -> Result:
            *first, lengths, segments, visibility = arrays
            return kernel(*first, lengths=lengths, segments=segments, visibility=visibility, **options)

        both = ROWS + KV_HEADS
        axes = both, both, both, ROWS, both, ROWS, ROWS, ""
        arrays = queries, keys, values, query_positions, key_positions, lengths, segments, visibility
        return over_mesh(own, axes, both)(*arrays)

    return split


IMPLEMENTATIONS = {
    "reference": reference.prefill_attention,
    "xla": xla.prefill_attention,
    "mosaic_tpu": _split(mosaic_tpu.prefill_attention),
    "triton": _split(triton.prefill_attention),
}
REMEMBERING = {
    "reference": reference.remembering,
    "xla": remember(xla.prefill_attention, xla_backward.backward),
    "mosaic_tpu": remember(IMPLEMENTATIONS["mosaic_tpu"], xla_backward.backward),
    "triton": triton.remembering,
}
"""The same, with what a backward pass needs; it is blocked XLA's on a TPU."""


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
    visibility: Bool[Array, "N N"] | None = None,
    implementation: str | None = None,
    tuning: Any = None,
) -> tuple[Float[Array, "B G R T V"], Float[Array, "B G R T"], dict[Column, Float[Array, "B G R S"]]]:
    """Attention of T new queries over S >= T keys: S - T past ones in any order, then the T new ones in order.

    Differentiable by output and log-sum-exp with memory linear in T (`gradient`); differentiating a statistic raises
    ValueError. It returns no probabilities: those of a few last queries are one product (`slot_logits` of
    `kvx.kernels.decode_attention`), formed and kept from derivatives by `kvx/loop.py`.

    Args:
        queries: rotated queries, R query heads for each KV head.
        keys, values: rotated keys and values, past tokens first.
        query_positions: true positions, rising; -1 marks padding, which comes last if S == T, sees nothing and counts
            nowhere.
        key_positions: true positions per KV head; -1 marks an empty slot or padding. The new tokens' are the queries'.
        scale, window, softcap: as in `kvx.decoder.AttentionSpec`.
        columns: statistics over the queries of the probability that a key received.
        lengths: tokens of each row, for statistics of near or of the last queries.
        segments: labels of queries and keys; positions rise within a label.
        visibility: entry (a, b): whether queries of label a see keys of label b; None: only their own label (packed
            documents) and those of label SHARED.
        implementation: "reference", "xla", "mosaic_tpu", "triton" (on a GPU, cuDNN included), or None, which picks by
            platform and arguments.
        tuning: of "triton" or "mosaic_tpu", their `Tuning`; None: by shape.

    Returns:
        Output and log-sum-exp per query head in float32 ((0, -inf) for a query that sees nothing), and the statistics.

    Raises:
        ValueError: shapes that do not fit together, a statistic that lacks lengths, or a named implementation that
            cannot take the arguments, before anything is compiled.
    """
    sight = Sight(query_positions, key_positions, lengths, segments, visibility)
    _check(queries, keys, values, sight, columns)
    check_masking(window, softcap)

    def refusal(name: str) -> str | None:
        rules = {"triton": triton.refusal, "mosaic_tpu": mosaic_tpu.refusal}
        if tuning is not None and name not in rules:
            return f"tuning is {tuning!r}, and it takes None"
        return rules[name](queries, keys, values, visibility) if name in rules else None

    options = {"scale": scale, "window": window, "softcap": softcap, "columns": tuple(columns)}
    if tuning is not None:
        options["tuning"] = tuning
    chosen = choose("prefill_attention", implementation, IMPLEMENTATIONS, refusal)
    name = next(name for name, function in IMPLEMENTATIONS.items() if function is chosen)
    return differentiable(Call(chosen, REMEMBERING[name], options), queries, keys, values, sight)


def _check(queries: Array, keys: Array, values: Array, sight: Sight, columns: tuple[Column, ...]) -> None:
    check_shape("queries", queries, (None,) * 5)
    check_shape("keys", keys, (None,) * 4)
    batch, kv_heads, _, length, dim = queries.shape
    if keys.shape[:2] != (batch, kv_heads) or keys.shape[3] != dim or keys.shape[2] < length:
        raise ValueError(f"keys have shape {keys.shape}, allowed is ({batch}, {kv_heads}, {length} or more, {dim})")
    check_shape("values", values, (*keys.shape[:3], None))
    check_shape("query_positions", sight.query_positions, (batch, length))
    check_shape("key_positions", sight.key_positions, keys.shape[:3])
    check_shape("lengths", sight.lengths, (batch,))
    for name, labels, size in zip(("queries", "keys"), sight.segments or (), (length, keys.shape[2]), strict=False):
        check_shape(f"segments of {name}", labels, (batch, size))
    for column in columns:
        if sight.lengths is None and min(column.near, column.last) < inf:
            raise ValueError(f"lengths is None, {column} needs the number of tokens of each row")
    if sight.visibility is not None and sight.segments is None:
        raise ValueError(
            "visibility is a table but segments is None, allowed is a table with labels of queries and keys"
        )
