"""Attention over runs and pages without a kernel of its own: what a CPU runs.

Blocks of slots are gathered for every head at a time, in a loop as long as the longest list; heads that share a row of
slots multiply all of it instead, masked, which reads every key once and on a CPU is cheaper than gathering by head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.decode_attention import decode_attention
from kvx.kernels.logits import partial_softmax, scaled_logits, visible
from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.kernels.ragged_decode_attention.reads import slots_of

BLOCK = 128
"""Slots of a run taken per turn of the loop."""

TURN = 256
"""Slots in pages taken per turn of the loop, or one page if that is more."""


def attend_runs(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B N E"],
    values: Float[Array, "B N V"] | None,
    starts: Int[Array, "B G"],
    lengths: Int[Array, "B G"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B N"] | None,
    *,
    value_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Partial:
    """Partial softmax of every head over its run."""
    keys, values = apart(keys, values, queries.shape[-1], value_dim)
    if queries.shape[1] > 1:
        return _masked(queries, keys, values, starts, lengths, query_positions, key_positions, scale, window, softcap)
    rows = keys.shape[1]
    masking = {"scale": scale, "window": window, "softcap": softcap, "implementation": "xla"}

    def turn(step: Int[Array, ""], part: Partial) -> Partial:
        offset = step * BLOCK + jnp.arange(BLOCK)
        index = jnp.minimum(starts + offset, rows - 1)
        held = offset < lengths
        slots = 0 if key_positions is None else jnp.take_along_axis(key_positions, index, axis=1)
        slots = jnp.where(held, slots, -1)[:, None]
        some_keys, some_values = (
            jnp.take_along_axis(each, index[..., None], axis=1)[:, None] for each in (keys, values)
        )
        some = decode_attention(queries, some_keys, some_values, query_positions, slots, **masking)
        return merge_partials(part, some)

    turns = (jnp.max(lengths, initial=0) + BLOCK - 1) // BLOCK
    return jax.lax.fori_loop(0, turns, turn, _nothing(queries, values))


def _masked(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B N D"],
    values: Float[Array, "B N V"],
    starts: Int[Array, "B G"],
    lengths: Int[Array, "B G"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B N"] | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Partial:
    batch, heads, group, length, dim = queries.shape
    logits = scaled_logits(queries.reshape(batch, -1, dim), keys, scale, softcap)
    place = jnp.arange(keys.shape[1]) - starts[..., None]
    slots = jnp.zeros_like(place) if key_positions is None else key_positions[:, None]
    slots = jnp.where((place >= 0) & (place < lengths[..., None]), slots, -1)
    seen = visible(query_positions[:, None, None, :, None], slots[:, :, None, None, :], window)
    seen = jnp.broadcast_to(seen, (batch, heads, group, length, keys.shape[1]))
    part = partial_softmax(jnp.where(seen.reshape(logits.shape), logits, -jnp.inf), values)
    return Partial(part.out.reshape(*queries.shape[:4], -1), part.lse.reshape(queries.shape[:4]))


def attend_pages(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "N p E"],
    values: Float[Array, "N p V"] | None,
    table: Int[Array, "B G P"],
    lengths: Int[Array, "B G"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "M"] | None,
    *,
    value_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Partial:
    """Partial softmax of every head over the pages that its table names."""
    keys, values = apart(keys, values, queries.shape[-1], value_dim)
    page = keys.shape[1]
    per_turn = max(TURN // page, 1)
    masking = {"scale": scale, "window": window, "softcap": softcap, "implementation": "xla"}

    def turn(step: Int[Array, ""], part: Partial) -> Partial:
        runs = step * per_turn + jnp.arange(per_turn)
        pages = jnp.maximum(table[..., jnp.minimum(runs, table.shape[-1] - 1)], 0)
        place = (runs[:, None] * page + jnp.arange(page)).reshape(-1)
        shape = (*lengths.shape, per_turn * page)
        slots = (
            jnp.zeros(shape, jnp.int32)
            if key_positions is None
            else key_positions[slots_of(pages, page)].reshape(shape)
        )
        slots = jnp.where(place < lengths[..., None], slots, -1)
        # Zeros where there is no token, since 0 * nan would be nan.
        some_keys, some_values = (
            jnp.where((slots >= 0)[..., None], each[pages].reshape(*shape, -1), 0) for each in (keys, values)
        )
        some = decode_attention(queries, some_keys, some_values, query_positions, slots, **masking)
        return merge_partials(part, some)

    width = per_turn * page
    turns = (jnp.max(lengths, initial=0) + width - 1) // width
    return jax.lax.fori_loop(0, turns, turn, _nothing(queries, values))


def apart(keys: Array, values: Array | None, dim: int, value_dim: int) -> tuple[Array, Array]:
    """Keys and values of rows that may hold both: the first channels, and the last."""
    return keys[..., :dim], keys[..., keys.shape[-1] - value_dim :] if values is None else values


def _nothing(queries: Float[Array, "B G R T D"], values: Float[Array, "*any V"]) -> Partial:
    shape = (*queries.shape[:4], values.shape[-1])
    return Partial(jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], -jnp.inf, jnp.float32))
