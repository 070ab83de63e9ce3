"""Prefill: a prompt in, its logits and compressed cache out; whole, in chunks, or onto an existing cache."""

from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvx.buckets import bucket, shortest
from kvx.cache import KVCache
from kvx.cache_builder import CacheBuilder
from kvx.chunks import ChunkedPrompt
from kvx.context import Context, Layout, Spec
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.evidence import Evidence, Requests
from kvx.feeding import extend
from kvx.inputs import check_layout, checked_labels, checked_policy, checked_prompt, traced
from kvx.loop import attend, last_logits
from kvx.mesh import place_rows, placement_of
from kvx.parts.amounts import whole
from kvx.policy import Policy
from kvx.tokens import Tokens


@overload
def prefill(
    model: Decoder,
    tokens: Array | np.ndarray,
    policy: Policy,
    lengths: Array | np.ndarray | None = None,
    cache: KVCache | None = None,
    *,
    labels: Array | np.ndarray | None = None,
    max_new_tokens: int = 128,
    prefill_chunk: int | None = None,
    compress: str = "end",
    cache_dtype: Any = None,
) -> tuple[Float[Array, "B N"], KVCache]: ...


@overload
def prefill(
    model: Decoder,
    tokens: Array | np.ndarray,
    policy: tuple[Policy, ...],
    lengths: Array | np.ndarray | None = None,
    cache: KVCache | None = None,
    *,
    labels: Array | np.ndarray | None = None,
    max_new_tokens: int = 128,
    prefill_chunk: int | None = None,
    compress: str = "end",
    cache_dtype: Any = None,
) -> tuple[Float[Array, "B N"], tuple[KVCache, ...]]: ...


def prefill(
    model: Decoder,
    tokens: Array | np.ndarray,
    policy: Policy | tuple[Policy, ...],
    lengths: Array | np.ndarray | None = None,
    cache: KVCache | None = None,
    *,
    labels: Array | np.ndarray | None = None,
    max_new_tokens: int = 128,
    prefill_chunk: int | None = None,
    compress: str = "end",
    cache_dtype: Any = None,
) -> tuple[Float[Array, "B N"], KVCache | tuple[KVCache, ...]]:
    """Run a batch of prompts and compress what they leave behind.

    Attention over the prompt is exact; the policy decides from its evidence, layer by layer, so that at most one
    layer's full keys and values exist at a time (policies that decide at the end hold all layers').

    Args:
        model: a decoder of `kvx.models`.
        tokens: token ids, right-padded; rows may have different lengths.
        policy: one policy, or a tuple of policies that share one pass over the prompt.
        lengths: tokens of each row; None: all of them.
        cache: continue this cache instead: the tokens are fed through the decode path, where every policy acts.
        labels: an integer for every token (segment, sentence, kind), for policies that read them.
        max_new_tokens: room to leave for decoding.
        prefill_chunk: process the prompt in chunks of so many tokens; None: whole.
        compress: for chunks: "end" accumulates the evidence and equals the unchunked result (peak: the full cache);
            "chunk" cuts the cache to its budget after every chunk, by the chunk's own last queries (bounded memory).
        cache_dtype: dtype of full-precision keys and values in the cache; None: the model's.

    Returns:
        float32 logits after each row's last token, and the cache (a tuple of caches for a tuple of policies).

    Raises:
        BadInput: anything about the arguments that cannot work, before anything is compiled.
    """
    alone = not isinstance(policy, tuple)
    policies = tuple(checked_policy(each) for each in (policy if isinstance(policy, tuple) else (policy,)))
    if not policies:
        raise BadInput("policy is an empty tuple; allowed: a policy, or a tuple of at least one")
    if compress not in ("end", "chunk"):
        raise BadInput(f"compress={compress!r} is not offered; allowed: 'end', 'chunk'")
    if cache is not None:
        if not alone:
            raise BadInput("policy is a tuple, but a cache is continued under one policy; allowed: one policy")
        if labels is not None:
            raise BadInput("labels are given for a cache that is continued; allowed: labels of the prompt, at prefill")
        return extend(model, tokens, policies[0], lengths, cache)
    tokens, lengths = checked_prompt(model, tokens, lengths, policies, max_new_tokens)
    labels = checked_labels(labels, tokens)
    _check_company(policies, prefill_chunk, compress)
    room = max_new_tokens if traced(tokens, lengths) else bucket(max(max_new_tokens, 1))
    fewest = 1 if traced(lengths) else shortest(int(jnp.min(lengths)))
    width = tokens.shape[1] if traced(tokens) else bucket(tokens.shape[1])
    tokens, labels = (jnp.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in (tokens, labels))
    placement = placement_of(model)
    tokens, labels, lengths = place_rows(placement, (tokens, labels, lengths))
    # A policy with an opinion on where tokens stand, or on which of them go on, has the pass for itself.
    layout = policies[0].layout(labels, lengths)
    check_layout(model, layout, max_new_tokens)
    specs = [Spec(block.spec, len(model.blocks), width, fewest, room) for block in model.blocks]
    builders = [CacheBuilder(each, specs, max_new_tokens, cache_dtype, placement) for each in policies]
    if prefill_chunk is None:
        logits, seen = _whole(model, tokens, labels, lengths, layout, builders)
    else:
        chunk = whole(prefill_chunk, "prefill_chunk", least=1)
        logits, seen = _chunked(model, tokens, labels, lengths, builders, chunk, compress), lengths
    caches = tuple(builder.finish(lengths, seen) for builder in builders)
    return logits, caches[0] if alone else caches


def _check_company(policies: tuple[Policy, ...], prefill_chunk: int | None, compress: str) -> None:
    """Refuse policies that cannot share a pass, or cannot do with chunks."""
    for policy in policies:
        if policy.alone and len(policies) > 1:
            raise BadInput(f"policy is a tuple, but {policy.text} changes what later layers compute; allowed: it alone")
        if policy.alone and prefill_chunk is not None:
            raise BadInput(
                f"prefill_chunk={prefill_chunk} cannot serve {policy.text}, which needs the whole prompt at once; "
                "allowed: None"
            )
    if prefill_chunk is None or compress == "end":
        return
    if len(policies) > 1:
        raise BadInput(
            "policy is a tuple, but with compress='chunk' each policy changes what later chunks see; "
            "allowed: one policy"
        )
    for policy in policies:
        reasons = {
            "keeps a trace of every token that leaves": any(stage.recalls for stage in policy.stages),
            "decides by the whole prompt": policy.selects_by_measure,
            "decides when every layer's prompt is known": policy.decides != "layer",
        }
        for reason, holds in reasons.items():
            if holds:
                raise BadInput(f"compress='chunk' cannot serve {policy.text}, which {reason}; allowed: 'end'")


def _whole(
    model: Decoder,
    tokens: Int[Array, "B T"],
    labels: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    layout: Layout | None,
    builders: list[CacheBuilder],
) -> tuple[Float[Array, "B N"], Int[Array, "B"]]:
    """Logits after the whole prompt at once, and each row's next position; every builder takes each layer."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.where(index < lengths[:, None], index, -1)
    policy = builders[0].policy
    where: dict[str, Any] = {"lengths": lengths}
    if layout is not None:
        positions = layout.positions
        where |= {"segments": layout.segments, "visibility": layout.visibility}
    marks = {"id": tokens, "label": labels}
    x = embed(model, tokens)
    for layer, block in enumerate(model.blocks):
        requests, rotated = _union(builders, layer)
        here = {name: marks[name] for name in requests.marks}
        x, new, evidence = attend(block, x, positions, requests=requests, rotated=rotated, marks=here, **where)
        forms = {rotated: new}
        for builder in builders:
            # Each policy gets the form it keeps, so that it compiles to the same program as alone.
            form = builder.policies[layer].rotated
            if form not in forms:
                forms[form] = _reform(new, rotated=form)
            builder.take(layer, forms[form], evidence, lengths)
        left = policy.at(layer, len(model.blocks)).remaining(builders[0].specs[layer], layer)
        if left is not None:
            context = Context(jnp.int32(layer), lengths, builders[0].specs[layer])
            x, positions, marks = _thin(policy, x, positions, marks, new, evidence, context, left=left)
        # Bound any longer, they would live on beside the next layer's.
        del new, forms, evidence
    last = jnp.sum(positions >= 0, axis=1) - 1
    return last_logits(model, x, last), jnp.max(positions, axis=1) + 1


@partial(jax.jit, static_argnames=("left",))
def _thin(policy: Policy, x, positions, marks, tokens: Tokens, evidence: Evidence, context: Context, *, left: int):
    """The residual stream, positions and marks of the tokens that go on, gathered to the front of `left` places."""
    mask = policy.thin(tokens, evidence, context) & (positions >= 0)
    # Ranked stably, those that go on come first and in order.
    order = jnp.argsort(~mask, axis=1, stable=True)[:, :left]
    going = jnp.take_along_axis(mask, order, axis=1)
    marks = {name: jnp.take_along_axis(mark, order, axis=1) for name, mark in marks.items()}
    positions = jnp.where(going, jnp.take_along_axis(positions, order, axis=1), -1)
    return jnp.take_along_axis(x, order[..., None], axis=1), positions, marks


def _chunked(model, tokens, labels, lengths, builders, chunk: int, compress: str):
    """Logits after the prompt in chunks of `chunk` tokens, each attending to the past ones."""
    prompt = ChunkedPrompt(lengths, chunk)
    marks = {
        name: jnp.pad(mark, ((0, 0), (0, -tokens.shape[1] % chunk)))
        for name, mark in (("id", tokens), ("label", labels))
    }
    logits = jnp.zeros((tokens.shape[0], model.vocabulary), jnp.float32)
    for start in range(0, tokens.shape[1], chunk):
        piece = tokens[:, start : start + chunk]
        x = embed(model, jnp.pad(piece, ((0, 0), (0, chunk - piece.shape[1]))))
        last = start + chunk >= tokens.shape[1]
        for layer, block in enumerate(model.blocks):
            requests, rotated = _union(builders, layer)
            here = {name: marks[name] for name in requests.marks}
            x = prompt.extend(layer, block, x, start, requests, rotated, builders[0].policy.renumber, here)
            if last:
                tokens_held, evidence = prompt.finished(layer)
                for builder in builders:
                    builder.take(layer, tokens_held, evidence, lengths)
            elif compress == "chunk":
                builder = builders[0]
                prompt.cut(layer, builder.policies[layer], builder.capacities[layer], builder.specs[layer])
        within = (lengths > start) & (lengths <= start + chunk)
        ends = last_logits(model, x, jnp.clip(lengths - 1 - start, 0, chunk - 1))
        logits = jnp.where(within[:, None], ends, logits)
    return logits


def _union(builders: list[CacheBuilder], layer: int) -> tuple[Requests, bool]:
    """Evidence that any of the policies reads in this layer, and whether rotated keys serve them all."""
    requests = Requests()
    for builder in builders:
        requests |= builder.policies[layer].observe(prefill=True)
    return requests, all(builder.policies[layer].rotated for builder in builders)


@partial(jax.jit, static_argnames=("rotated",))
def _reform(tokens: Tokens, *, rotated: bool) -> Tokens:
    return tokens.with_form(rotated)


@jax.jit
def embed(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """The first block's input, compiled."""
    return model.embed(tokens)
