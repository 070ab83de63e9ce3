"""Causal attention over a prompt that also reports what it saw: log-sum-exp and column statistics, never S x S."""

from jaxtyping import Array, Bool, Float, Int

from kvx.kernels.prefill_attention import reference, xla
from kvx.kernels.prefill_attention.columns import Column

IMPLEMENTATIONS = {"reference": reference.prefill_attention, "xla": xla.prefill_attention}


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
) -> tuple[Float[Array, "B G R T V"], Float[Array, "B G R T"], dict[Column, Float[Array, "B G R S"]]]:
    """Attention of T new queries over S >= T keys: S - T past ones in any order, then the T new ones in order.

    Args:
        queries: rotated queries, R query heads for each KV head.
        keys, values: rotated keys and values, past tokens first.
        query_positions: true positions; -1 marks padding, which sees nothing and counts nowhere.
        key_positions: true positions per KV head; -1 marks an empty slot or padding.
        scale, window, softcap: as in `kvx.decoder.AttentionSpec`.
        columns: statistics over the queries of the probability that a key received.
        lengths: tokens of each row, for statistics of near or of the last queries.
        segments: labels of queries and keys.
        visibility: entry (a, b): whether queries of label a see keys of label b; None: only their own label (packed
            documents) and those of label SHARED.
        implementation: "reference", "xla", or None, which picks by platform.

    Returns:
        Output and log-sum-exp per query head in float32 ((0, -inf) for a query that sees nothing), and the statistics.
    """
    chosen = IMPLEMENTATIONS[implementation or "xla"]
    return chosen(
        queries,
        keys,
        values,
        query_positions,
        key_positions,
        scale=scale,
        window=window,
        softcap=softcap,
        columns=columns,
        lengths=lengths,
        segments=segments,
        visibility=visibility,
    )
