"""Prefill: a prompt in, its logits and compressed cache out; whole, in chunks, or onto an existing cache."""

from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvx.buckets import bucket, part, shortest
from kvx.cache import ENDLESS, KVCache
from kvx.chunks import ChunkedPrompt
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.evidence import Evidence, Requests
from kvx.inputs import check_layout, checked_labels, checked_policy, checked_prompt, traced
from kvx.loop import attend, last_logits, pack_layer
from kvx.mesh import Placement, place_cache, place_rows, placement_of
from kvx.parts.amounts import whole
from kvx.places import place
from kvx.policy import Context, Layer, Layout, Policy, Spec, round_up
from kvx.tokens import Tokens

MARKS = frozenset({"id", "label"})
"""Integers that come with each token of a prompt, if a policy asks for them."""


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
    if compress not in ("end", "chunk"):
        raise BadInput(f"compress={compress!r} is not offered; allowed: 'end', 'chunk'")
    if cache is not None:
        from kvx.generate import extend

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
    plans = [_Plan(each, specs, max_new_tokens, cache_dtype, placement) for each in policies]
    if prefill_chunk is None:
        logits, seen = _whole(model, tokens, labels, lengths, layout, plans)
    else:
        chunk = whole(prefill_chunk, "prefill_chunk", least=1)
        logits, seen = _chunked(model, tokens, labels, lengths, plans, chunk, compress), lengths
    caches = tuple(plan.finish(lengths, seen) for plan in plans)
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
    if any(stage.recalls for stage in policies[0].stages):
        raise BadInput(
            f"compress='chunk' cannot serve {policies[0].text}, which keeps a trace of every token that leaves; "
            "allowed: 'end'"
        )
    if policies[0].measures:
        raise BadInput(
            f"compress='chunk' cannot serve {policies[0].text}, which decides by the whole prompt; allowed: 'end'"
        )
    if policies[0].decides != "layer":
        raise BadInput(
            f"compress='chunk' cannot serve {policies[0].text}, which decides when every layer's prompt is known; "
            "allowed: 'end'"
        )


class _Plan:
    """One policy's cache in the making: finished layers, or all layers' material if it decides at the end."""

    def __init__(self, policy: Policy, specs: list[Spec], wanted: int, dtype: Any, placement: Placement | None):
        self.wanted = jnp.int32(wanted)  # data, unlike the room it is rounded up to: it compiles nothing
        self.specs, self.dtype, self.placement = specs, dtype, placement
        self.policies = [policy.at(layer, len(specs)) for layer in range(len(specs))]
        # Also refuses impossible budgets, before any work.
        self.slots = [
            each.slots(spec, layer) for layer, (each, spec) in enumerate(zip(self.policies, specs, strict=True))
        ]
        self.capacities = [
            each.capacity(spec, layer) for layer, (each, spec) in enumerate(zip(self.policies, specs, strict=True))
        ]
        self.policy = policy
        self.storage: tuple[Any, ...] = ()
        self.places: list[Any] = []
        self.states: list[tuple[Any, ...]] = []
        self.held: list[Any] = []
        self.carry: Any = None

    def take(self, layer: int, tokens: Tokens, evidence: Evidence, lengths: Int[Array, "B"]) -> None:
        """This layer's tokens and evidence are complete."""
        # Policies that share a pass share its evidence: without what others asked for, a policy compiles to the same
        # program as alone, and one that decides at the end holds no more than it reads.
        wanted = self.policies[layer].observe(prefill=True)
        evidence, tokens = evidence.only(wanted), tokens.with_only(wanted.marks | tokens.stats.keys() - MARKS)
        if self.policy.decides == "end":
            self.held.append((tokens, evidence))
        elif self.policy.decides == "cascade":
            context = Context(jnp.int32(layer), lengths, self.specs[layer])
            self.carry = _ascend(
                self.policies[layer],
                self.carry,
                tokens.astype(self.dtype),
                evidence,
                context,
                placement=self.placement,
            )
        else:
            self._pack(layer, tokens, evidence, lengths, None)

    def finish(self, lengths: Int[Array, "B"], seen: Int[Array, "B"]) -> KVCache:
        """The cache, once every layer is in; `seen` is each row's next true position."""
        if self.held:
            shares = _plan_over_layers(self.policy, self.held, self.specs[0], lengths, seen + self.wanted)
            for layer in range(len(self.held)):
                tokens, evidence = self.held[layer]
                self.held[layer] = None  # each layer's full keys and values go as soon as they are packed
                self._pack(layer, tokens, evidence, lengths, shares[layer])
        if self.carry is not None:
            for layer, spec in enumerate(self.specs):
                context = Context(jnp.int32(layer), lengths, spec)
                self._put(_land(self.policies[layer], self.carry, context, placement=self.placement))
            self.carry = None
        # An exempt layer keeps every token, so it needs room though others are bounded.
        endless = all(
            each.endless(spec, layer) for layer, (each, spec) in enumerate(zip(self.policies, self.specs, strict=True))
        )
        room = ENDLESS if endless else self.specs[0].room
        # Placed too, or the first decode step would take a different program than all that follow.
        # Copied, since a cache is donated: caches of one pass, and the caller's own lengths, must not go with it.
        counters = place_rows(self.placement, (jnp.copy(seen), jnp.int32(room)))
        return KVCache(self.storage, tuple(self.places), tuple(self.states), *counters)

    def _pack(self, layer: int, tokens: Tokens, evidence: Evidence, lengths: Int[Array, "B"], plan: Any) -> None:
        # The last place in a slot says whether it is still open.
        slots_open = {where.slot: where.shared for where in self.places}
        shared = tuple(self.storage[slot] for slot, is_open in sorted(slots_open.items()) if is_open)
        context = Context(jnp.int32(layer), lengths, self.specs[layer], plan, shared)
        policy, slots = self.policies[layer], self.slots[layer]
        if policy.measures and not traced(lengths):
            slots = min(round_up(part(int(_need(policy, tokens, evidence, context)), slots)), slots)
        self._put(
            pack_layer(policy, tokens, evidence, context, slots=slots, dtype=self.dtype, placement=self.placement)
        )

    def _put(self, entry: Layer) -> None:
        where, self.storage = place(entry.store, self.storage)
        self.places.append(where)
        self.states.append(entry.states)


@partial(jax.jit, static_argnames=("spec",))
def _plan_over_layers(
    policy: Policy,
    held: list[tuple[Tokens, Evidence]],
    spec: Spec,
    lengths: Int[Array, "B"],
    ends: Int[Array, "B"],
) -> list[tuple[Any, ...]]:
    """For every layer, each acting stage's share of what it decides over the layers where it acts."""
    shares: list[tuple[Any, ...]] = [()] * len(held)
    for stage in policy.stages:
        acting = [layer for layer in range(len(held)) if stage.at(layer, len(held)) is not None]
        planned = stage.plan([stage.measure(*held[layer]) for layer in acting], spec, lengths, ends)
        for layer, share in zip(acting, planned, strict=True):
            shares[layer] = (*shares[layer], share)
    return shares


@jax.jit
def _need(policy: Policy, tokens: Tokens, evidence: Evidence, context: Context) -> Int[Array, ""]:
    return policy.need(tokens, evidence, context)


@partial(jax.jit, static_argnames=("placement",), donate_argnames="carry")
def _ascend(
    policy: Policy, carry: Any, tokens: Tokens, evidence: Evidence, context: Context, *, placement: Placement | None
) -> Any:
    (stage,) = policy.stages
    carry = stage.ascend(carry, tokens, evidence, context)
    return place_cache(placement, carry, len(context.lengths), context.spec.attention.kv_heads)


def _land(policy: Policy, carry: Any, context: Context, *, placement: Placement | None) -> Layer:
    """Not compiled: what layers share passes through as it is, where a program would copy it for each."""
    (stage,) = policy.stages
    store, state = stage.land(carry, context)
    return place_cache(placement, Layer(store, (state,)), len(context.lengths), context.spec.attention.kv_heads)


def _whole(
    model: Decoder,
    tokens: Int[Array, "B T"],
    labels: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    layout: Layout | None,
    plans: list[_Plan],
) -> tuple[Float[Array, "B N"], Int[Array, "B"]]:
    """Logits after the whole prompt at once, and each row's next position; every plan takes each layer as it comes."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.where(index < lengths[:, None], index, -1)
    policy = plans[0].policy
    where = {"lengths": lengths}
    if layout is not None:
        positions = layout.positions
        where |= {"segments": layout.segments, "visibility": layout.visibility}
    marks = {"id": tokens, "label": labels}
    x = embed(model, tokens)
    for layer, block in enumerate(model.blocks):
        requests, rotated = _union(plans, layer)
        here = {name: marks[name] for name in requests.marks}
        x, new, evidence = attend(block, x, positions, requests=requests, rotated=rotated, marks=here, **where)
        forms = {rotated: new}
        for plan in plans:
            # Each policy gets the form it keeps, so that it compiles to the same program as alone.
            form = plan.policies[layer].rotated
            if form not in forms:
                forms[form] = _reform(new, rotated=form)
            plan.take(layer, forms[form], evidence, lengths)
        left = policy.at(layer, len(model.blocks)).remaining(plans[0].specs[layer], layer)
        if left is not None:
            context = Context(jnp.int32(layer), lengths, plans[0].specs[layer])
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


def _chunked(model, tokens, labels, lengths, plans, chunk: int, compress: str):
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
            requests, rotated = _union(plans, layer)
            here = {name: marks[name] for name in requests.marks}
            x = prompt.extend(layer, block, x, start, requests, rotated, plans[0].policy.renumber, here)
            if last:
                tokens_held, evidence = prompt.finished(layer)
                for plan in plans:
                    plan.take(layer, tokens_held, evidence, lengths)
            elif compress == "chunk":
                plan = plans[0]
                prompt.cut(layer, plan.policies[layer], plan.capacities[layer], plan.specs[layer])
        within = (lengths > start) & (lengths <= start + chunk)
        ends = last_logits(model, x, jnp.clip(lengths - 1 - start, 0, chunk - 1))
        logits = jnp.where(within[:, None], ends, logits)
    return logits


def _union(plans: list[_Plan], layer: int) -> tuple[Requests, bool]:
    """Evidence that any of the policies reads in this layer, and whether rotated keys serve them all."""
    requests = Requests()
    for plan in plans:
        requests |= plan.policies[layer].observe(prefill=True)
    return requests, all(plan.policies[layer].rotated for plan in plans)


@partial(jax.jit, static_argnames=("rotated",))
def _reform(tokens: Tokens, *, rotated: bool) -> Tokens:
    return tokens.with_form(rotated)


@jax.jit
def embed(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """The first block's input, compiled."""
    return model.embed(tokens)
