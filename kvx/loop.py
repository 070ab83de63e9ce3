"""The layer loop over a prompt: project, attend, finish, and what a policy's evidence is made of."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.context import Context
from kvx.decoder import Block, Decoder
from kvx.evidence import NOTHING, Evidence, Requests
from kvx.kernels.decode_attention import slot_logits
from kvx.kernels.logits import softmax_rows
from kvx.kernels.prefill_attention import prefill_attention
from kvx.kernels.prefill_attention.gradient import without_derivative
from kvx.mesh import Placement, kernels_on, place_cache, placement_of
from kvx.policy import Layer, Policy
from kvx.query import Query, to_heads
from kvx.rotary import Rotary, Turn
from kvx.tokens import Tokens, concatenate


def project(block: Block, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> tuple[Query, Tokens]:
    """The layer's queries, and its new tokens with unrotated keys."""
    q, k, v = block.project(x)
    if block.spec.latent:
        v = v[..., :0]
    query = Query.from_heads(q, positions, block.rotary, block.spec)
    spots = jnp.broadcast_to(positions[:, None, :], (positions.shape[0], block.spec.kv_heads, positions.shape[1]))
    tokens = Tokens(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), spots, block.rotary, rotated=False)
    return query, tokens


def attend(
    block: Block, x: Float[Array, "B T E"], positions: Int[Array, "B T"], past: Tokens | None = None, **named: Any
) -> tuple[Float[Array, "B T E"], Tokens, Evidence]:
    """`attend_turned`, its angles first: cosines and sines come from a program of their own.

    Within the layer's XLA on a CPU would compute them anew for every head and run of keys, a tenth of the time at 2048
    tokens.
    """
    return attend_turned(block, x, positions, turn_to(block.rotary, positions), past, **named)


@jax.jit
def turn_to(rotary: Rotary, positions: Int[Array, "B T"]) -> Turn:
    """To the positions of new tokens, for (B, G, R, T, D)."""
    return rotary.turn(positions[:, None, None])


@partial(jax.jit, static_argnames=("requests", "rotated", "renumber"))
def attend_turned(
    block: Block,
    x: Float[Array, "B T E"],
    positions: Int[Array, "B T"],
    turn: Turn,
    past: Tokens | None = None,
    segments: Int[Array, "B T"] | None = None,
    *,
    requests: Requests = NOTHING,
    rotated: bool = True,
    renumber: bool = False,
    lengths: Int[Array, "B"] | None = None,
    marks: Mapping[str, Int[Array, "B T"]] | None = None,
    visibility: Bool[Array, "N N"] | None = None,
) -> tuple[Float[Array, "B T E"], Tokens, Evidence]:
    """One layer over a prompt or a chunk of one: exact attention over the past tokens and the new ones.

    One jitted function called layer by layer, so that layers of equal spec share one compiled body.

    Args:
        positions: true positions, -1 for padding.
        turn: the rotation to them (`turn_to`).
        past: tokens before this chunk, gathered to the front; None for a whole prompt.
        requests: the evidence to collect.
        rotated: the form of the keys in the returned tokens.
        renumber: rotate by place among the tokens at hand instead of by true position.
        lengths: of the rows' whole prompts, for statistics of near queries.
        marks: integers of the new tokens; those that were asked for travel in their statistics.
        segments: labels of the new tokens, if not all see each other.
        visibility: which label sees which; None: each its own, and SHARED.

    Returns:
        The layer's output, its new tokens, and the evidence over past and new tokens in that order.
    """
    query, raw = project(block, x, positions)
    raw = marked(raw, {name: mark for name, mark in (marks or {}).items() if name in requests.marks})
    turned = replace(raw, keys=turn(raw.keys[:, :, None])[:, :, 0], rotated=True)
    turned_queries, new = turn(query.raw), turned if rotated else raw
    everything = new if past is None else concatenate(past, turned if past.rotated else raw)
    if renumber:
        places = jnp.where(everything.present, jnp.cumsum(everything.present, axis=-1) - 1, 0)
        keys = everything.rotary(everything.raw_keys, places)
        queries = query.at(places[..., -positions.shape[1] :])
    else:
        keys, queries = turned.keys if past is None else everything.rotated_keys, turned_queries
    form, operands = block, (queries, keys, everything.attended_values, positions, everything.positions)
    apart = not any(column.pooled for column in requests.columns)  # those are means over the heads that share a key
    if block.spec.latent and past is None and not renumber and apart:
        # Over a whole text, keys and values of every head are cheaper to attend than the wide rows that a cache keeps.
        form = block.expanded
        whole, its = project(form, x, positions)
        operands = (whole.rotated, its.rotated_keys, its.attended_values, positions, its.positions)
    with kernels_on(placement_of(block)):
        out, _, columns = prefill_attention(
            *operands,
            columns=tuple(sorted(requests.columns)),
            lengths=lengths,
            segments=None if segments is None else (segments, segments),
            visibility=visibility,
            **query.masking,
        )
    columns = {column: found.reshape(*queries.shape[:3], -1) for column, found in columns.items()}
    rows: Any = None
    if requests.rows:
        assert segments is None, "rows of probabilities are of tokens that all see each other"
        last, spots = last_queries(queries, positions, requests.rows)
        rows = without_derivative("rows", window_rows(last, spots, keys, everything.positions, query.masking))
    peak = None
    if requests.query:
        valid = (positions >= 0)[:, None, None, :, None]
        peak = jnp.max(jnp.where(valid, jnp.abs(turned_queries.astype(jnp.float32)), 0.0), axis=(2, 3))
    seen = jnp.max(everything.positions, axis=(1, 2)) + 1
    evidence = Evidence(seen, rows, columns, peak, turned_queries if requests.queries else None)
    return form.finish(x, to_heads(out).astype(x.dtype)), new, evidence


def marked(tokens: Tokens, marks: Mapping[str, Int[Array, "B T"]]) -> Tokens:
    """The tokens with integers of the text among their statistics, the same for every KV head."""
    spread = {name: jnp.broadcast_to(mark[:, None], tokens.positions.shape) for name, mark in marks.items()}
    return replace(tokens, stats={**tokens.stats, **spread})


def last_queries(
    queries: Float[Array, "B G R T D"], positions: Int[Array, "B T"], count: int
) -> tuple[Float[Array, "B G R W D"], Int[Array, "B W"]]:
    """Each row's own last queries, wherever its padding starts; position -1 where the row is shorter than that."""
    end = jnp.sum(positions >= 0, axis=1)
    index = end[:, None] - count + jnp.arange(count)
    spots = jnp.where(index >= 0, jnp.take_along_axis(positions, jnp.maximum(index, 0), axis=1), -1)
    return jnp.take_along_axis(queries, jnp.maximum(index, 0)[:, None, None, :, None], axis=3), spots


def window_rows(
    queries: Float[Array, "B G R W D"],
    query_positions: Int[Array, "B W"],
    keys: Float[Array, "B G S D"],
    key_positions: Int[Array, "B G S"],
    masking: dict,
) -> Float[Array, "B G R W S"]:
    """Probabilities of a few queries over all keys."""
    logits = slot_logits(queries, keys, query_positions, key_positions, **masking)
    batch, kv_heads, group, count, _ = queries.shape
    return softmax_rows(logits)[0].reshape(batch, kv_heads, group, count, -1)


@partial(jax.jit, static_argnames=("slots", "dtype", "placement"))
def pack_layer(
    policy: Policy,
    tokens: Tokens,
    evidence: Evidence,
    context: Context,
    *,
    slots: int,
    dtype: Any = None,
    placement: Placement | None = None,
) -> Layer:
    """One layer's cache from its tokens: the policy's selections and its store."""
    with kernels_on(placement):
        layer = policy.prefill(tokens.astype(dtype), evidence, context, slots)
    return place_cache(placement, layer, len(context.lengths), context.spec.attention.kv_heads)


@jax.jit
def last_logits(model: Decoder, x: Float[Array, "B T E"], index: Int[Array, "B"]) -> Float[Array, "B N"]:
    """Logits after one token of each row."""
    return model.unembed(jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0])


def forward(
    model: Decoder,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N"]:
    """Plain causal pass without a cache, for perplexity: float32 logits after every token.

    `kvx.train.forward` computes the same for training.

    Args:
        segments: labels of packed documents, none of them `SHARED` (-1): a token attends to its own document only.
        positions: true positions, -1 for padding, which sees nothing; None: they restart with every document.
    """
    if positions is None:
        positions = _restarting(tokens.shape, segments)
    x = model.embed(tokens)
    for block in model.blocks:
        x, _, _ = attend(block, x, positions, segments=segments)
    return model.unembed(x)


def _restarting(shape: tuple[int, ...], segments: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """Positions that count from 0 in every run of equal labels."""
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segments is None:
        return index
    first = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
