"""Decode attention over KV heads of different lengths: runs of slots with offsets, or pages behind block tables.

Per-head eviction then saves time as it saves memory: what is read is what is held.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.checks import check_masking, check_shape
from kvx.kernels.implementations import KERNELS, LANES, choose
from kvx.kernels.merge_partials import Partial
from kvx.kernels.over_mesh import KV_HEADS, ROWS, over_mesh
from kvx.kernels.ragged_decode_attention import mosaic_tpu, reference, triton, xla
from kvx.kernels.ragged_decode_attention.reads import Reads, by_list, positions_by_list

BOTH = ROWS + KV_HEADS


def ragged_decode_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B N E"],
    values: Float[Array, "B N V"] | None,
    starts: Int[Array, "B G"],
    lengths: Int[Array, "B G"],
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B N"] | None = None,
    *,
    scale: float,
    value_dim: int | None = None,
    longest: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    tuning: Any = None,
) -> Partial:
    """Partial softmax of each KV head over its own run of the row's slots (Ada-KV, Feng et al. 2024, flat storage).

    Head g of row b reads slots starts[b, g] to starts[b, g] + lengths[b, g] - 1; runs may lie anywhere, and overlap.

    Args:
        queries: rotated, R query heads for each KV head, bfloat16 or float32.
        keys: rotated, bfloat16 or float32, E = D.
        values: None: the last V channels of a row of keys are its value. E = D + V with the value behind the key, which
            a TPU needs where D and V are not multiples of 128; E = D where channels of the key are the value (MLA).
        starts: first slot of each head's run.
        lengths: slots of it; 0 gives (0, -inf).
        query_positions: true positions; None where `key_positions` is.
        key_positions: true positions, -1 where a slot is empty; None: every slot of a run is held and seen.
        scale: of the logits.
        value_dim: V, where `values` is None; None: E - D.
        longest: static bound on `lengths`; None: N.
        window: sliding window in positions, or None.
        softcap: logits become softcap tanh(logits / softcap), or None.
        implementation: "reference", "xla", "mosaic_tpu", "triton"; None: the best that takes these arguments on the
            platform compiled for.
        tuning: the implementation's own `Tuning`, or None.

    Returns:
        out (B, G, R, T, V) and lse (B, G, R, T), float32.

    Raises:
        ValueError: arguments that do not belong together, or a named implementation that does not take them.
    """
    value_dim = check(queries, keys, values, value_dim, query_positions, key_positions, window, softcap)
    check_shape("keys", keys, (len(queries), None, None))
    check_shape("key_positions", key_positions, keys.shape[:2])
    check_shape("starts", starts, queries.shape[:2])
    check_shape("lengths", lengths, queries.shape[:2])
    rows = keys.shape[1]
    longest = rows if longest is None else longest
    if not 0 <= longest <= rows:
        raise ValueError(f"longest is {longest}, allowed are 0 to the {rows} slots that a row has")

    def form(queries, keys, values, starts, lengths, query_positions, key_positions):
        batch = len(keys)
        reads = Reads(
            by_list(queries),
            keys.reshape(batch * rows, -1),
            None if values is None else values.reshape(batch * rows, -1),
            value_dim,
            lengths.reshape(-1),
            (starts + rows * jnp.arange(batch, dtype=starts.dtype)[:, None]).reshape(-1),
            None,
            1,
            longest,
            _listed(query_positions, queries),
            key_positions,
        )
        return reads, _by_head(queries)

    arrays = queries, keys, values, starts, lengths, query_positions, key_positions
    axes = BOTH, ROWS, ROWS, BOTH, BOTH, ROWS, ROWS
    masking = {"scale": scale, "window": window, "softcap": softcap}
    plain = partial(
        xla.attend_runs,
        queries,
        keys,
        values,
        starts,
        lengths,
        _positions(query_positions, queries),
        key_positions,
        value_dim=value_dim,
        **masking,
    )
    return attend("ragged_decode_attention", form, arrays, axes, plain, masking, implementation, tuning)


def paged_decode_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "N p E"],
    values: Float[Array, "N p V"] | None,
    table: Int[Array, "B G P"],
    lengths: Int[Array, "B G"],
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "M"] | None = None,
    *,
    scale: float,
    value_dim: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    tuning: Any = None,
) -> Partial:
    """Partial softmax of each KV head over the pages of its block table (PagedAttention, Kwon et al. 2023).

    A page belongs to one KV head, so that heads may hold different tokens, and different numbers of them.

    Args:
        queries: as of `ragged_decode_attention`.
        keys, values: N pages of p slots.
        table: page of each p slots of a head, in order; arbitrary beyond its length.
        lengths: slots of each head, at most P p; 0 gives (0, -inf).
        key_positions: true positions of all pages' slots in one run, -1 where one is empty; M is at least N p. A TPU
            reads them where they are if M is a multiple of 128.
        query_positions, scale, value_dim, window, softcap, implementation, tuning: as there.

    Returns:
        out (B, G, R, T, V) and lse (B, G, R, T), float32.

    Raises:
        ValueError: arguments that do not belong together, or a named implementation that does not take them.
    """
    value_dim = check(queries, keys, values, value_dim, query_positions, key_positions, window, softcap)
    check_shape("keys", keys, (None, None, None))
    check_shape("table", table, (*queries.shape[:2], None))
    check_shape("lengths", lengths, queries.shape[:2])
    pages, page, _ = keys.shape
    if key_positions is not None and (key_positions.ndim != 1 or key_positions.size < pages * page):
        raise ValueError(
            f"key_positions has shape {key_positions.shape}, allowed is one axis of {pages * page} slots or more"
        )

    def form(queries, keys, values, table, lengths, query_positions, key_positions):
        reads = Reads(
            by_list(queries),
            keys.reshape(pages * page, -1),
            None if values is None else values.reshape(pages * page, -1),
            value_dim,
            lengths.reshape(-1),
            None,
            table.reshape(-1, table.shape[-1]),
            page,
            table.shape[-1] * page,
            _listed(query_positions, queries),
            None if key_positions is None else _by_lanes(key_positions),
        )
        return reads, _by_head(queries)

    arrays = queries, keys, values, table, lengths, query_positions, key_positions
    axes = BOTH, "", "", BOTH, BOTH, ROWS, ""
    masking = {"scale": scale, "window": window, "softcap": softcap}
    plain = partial(
        xla.attend_pages,
        queries,
        keys,
        values,
        table,
        lengths,
        _positions(query_positions, queries),
        key_positions,
        value_dim=value_dim,
        **masking,
    )
    return attend("paged_decode_attention", form, arrays, axes, plain, masking, implementation, tuning)


def attend(
    operation: str,
    form: Callable[..., tuple[Reads, Callable[[Partial], Partial]]],
    arrays: Sequence[Any],
    axes: Sequence[str],
    plain: Callable[[], Partial],
    masking: dict[str, Any],
    implementation: str | None,
    tuning: Any,
) -> Partial:
    """The chosen implementation of an operation that reads lists of rows.

    Args:
        form: from the operation's arrays, or a device's part of them: the lists, and what brings that which is found by
            list into the form of the operation.
        arrays, axes: the operation's, and which of their axes a mesh may split (`over_mesh`).
        plain: its xla form, ready to be called.
        tuning: for the implementation whose it is; another has no use for it.
    """
    offered = {"reference": reference, "xla": None, "mosaic_tpu": mosaic_tpu, "triton": triton}

    def refusal(name: str) -> str | None:
        return offered[name].refusal(form(*arrays)[0]) if name in KERNELS else None  # type: ignore[union-attr]

    def run(module: Any) -> Partial:
        options = {"tuning": tuning} if isinstance(tuning, getattr(module, "Tuning", ())) else {}

        def own(*arrays: Any) -> Partial:
            reads, finish = form(*arrays)
            return finish(module.attend(reads, **masking, **options))

        return over_mesh(own, axes, BOTH)(*arrays)

    functions = {name: plain if module is None else partial(run, module) for name, module in offered.items()}
    return choose(operation, implementation, functions, refusal)()


def _by_head(queries: Float[Array, "B G R T D"]) -> Callable[[Partial], Partial]:
    shape = queries.shape[:4]
    return lambda part: Partial(part.out.reshape(*shape, -1), part.lse.reshape(shape))


def check(
    queries: Array,
    keys: Array,
    values: Array | None,
    value_dim: int | None,
    query_positions: Array | None,
    key_positions: Array | None,
    window: int | None,
    softcap: float | None,
) -> int:
    """Width of the values; keys are (..., E), and the values go along.

    Raises:
        ValueError: arguments that do not belong together.
    """
    check_shape("queries", queries, (None,) * 5)
    check_shape("values", values, (*keys.shape[:-1], None))
    check_shape("query_positions", query_positions, (queries.shape[0], queries.shape[3]))
    check_masking(window, softcap)
    dim, width = queries.shape[-1], keys.shape[-1]
    if values is not None and width != dim:
        raise ValueError(f"keys have {width} channels, allowed are the queries' {dim}")
    if values is None and width < dim:
        raise ValueError(f"keys have {width} channels, allowed are at least the queries' {dim}")
    if values is not None and value_dim not in (None, values.shape[-1]):
        raise ValueError(f"value_dim is {value_dim}, allowed is the values' {values.shape[-1]}, or None")
    found = values.shape[-1] if values is not None else width - dim if value_dim is None else value_dim
    if not 0 < found <= (width if values is None else found):
        raise ValueError(f"value_dim is {found}, allowed are 1 to the {width} channels of a row of keys")
    if (query_positions is None) != (key_positions is None):
        raise ValueError("query_positions and key_positions are given together or not at all, one of them is None")
    if window is not None and key_positions is None:
        raise ValueError(f"window is {window}, without positions allowed is None")
    return found


def _by_lanes(positions: Int[Array, "M"]) -> Int[Array, "m 128"]:
    """Cut to rows of whole lanes, which moves nothing where they fill them."""
    return jnp.pad(positions, (0, -len(positions) % LANES)).reshape(-1, LANES)


def _positions(positions: Int[Array, "B T"] | None, queries: Float[Array, "B G R T D"]) -> Int[Array, "B T"]:
    """Without positions, queries stand at 0, as every slot that is held does."""
    return jnp.zeros((queries.shape[0], queries.shape[3]), jnp.int32) if positions is None else positions


def _listed(positions: Int[Array, "B T"] | None, queries: Float[Array, "B G R T D"]) -> Int[Array, "L M"] | None:
    return None if positions is None else positions_by_list(positions, *queries.shape[1:3])
