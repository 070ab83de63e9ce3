"""Prefill: a prompt in, its logits and compressed cache out; whole, in chunks, or onto an existing cache."""

from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvx.buckets import bucket, shortest
from kvx.cache import ENDLESS, KVCache
from kvx.chunks import ChunkedPrompt
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.evidence import Evidence, Requests
from kvx.inputs import checked_policy, checked_prompt, traced
from kvx.loop import attend, last_logits, pack_layer
from kvx.mesh import Placement, place_rows, placement_of
from kvx.parts.amounts import whole
from kvx.places import place
from kvx.policy import Context, Policy, Spec
from kvx.tokens import Tokens


@overload
def prefill(
    model: Decoder,
    tokens: Array | np.ndarray,
    policy: Policy,
    lengths: Array | np.ndarray | None = None,
    cache: KVCache | None = None,
    *,
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
        return extend(model, tokens, policies[0], lengths, cache)
    tokens, lengths = checked_prompt(model, tokens, lengths, policies, max_new_tokens)
    room = max_new_tokens if traced(tokens, lengths) else bucket(max(max_new_tokens, 1))
    fewest = 1 if traced(lengths) else shortest(int(jnp.min(lengths)))
    width = tokens.shape[1] if traced(tokens) else bucket(tokens.shape[1])
    tokens = jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    placement = placement_of(model)
    tokens, lengths = place_rows(placement, (tokens, lengths))
    specs = [Spec(block.spec, len(model.blocks), width, fewest, room) for block in model.blocks]
    if prefill_chunk is not None and compress == "chunk" and not alone:
        raise BadInput(
            "policy is a tuple, but with compress='chunk' each policy changes what later chunks see; "
            "allowed: one policy"
        )
    if prefill_chunk is not None and compress == "chunk" and policies[0].decides == "end":
        raise BadInput(
            f"compress='chunk' cannot serve {policies[0].text}, which decides when every layer's prompt is known; "
            "allowed: 'end'"
        )
    plans = [_Plan(each, specs, cache_dtype, placement) for each in policies]
    if prefill_chunk is None:
        x = _whole(model, tokens, lengths, plans)
        logits = last_logits(model, x, lengths - 1)
    else:
        chunk = whole(prefill_chunk, "prefill_chunk", least=1)
        logits = _chunked(model, tokens, lengths, plans, chunk, compress)
    caches = tuple(plan.finish(lengths) for plan in plans)
    return logits, caches[0] if alone else caches


class _Plan:
    """One policy's cache in the making: finished layers, or all layers' material if it decides at the end."""

    def __init__(self, policy: Policy, specs: list[Spec], dtype: Any, placement: Placement | None):
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

    def take(self, layer: int, tokens: Tokens, evidence: Evidence, lengths: Int[Array, "B"]) -> None:
        """This layer's tokens and evidence are complete."""
        # Policies that share a pass share its evidence: without what others asked for, a policy compiles to the same
        # program as alone, and one that decides at the end holds no more than it reads.
        evidence = evidence.only(self.policies[layer].observe(prefill=True))
        if self.policy.decides == "end":
            self.held.append((tokens, evidence))
        else:
            self._pack(layer, tokens, evidence, lengths, None)

    def finish(self, lengths: Int[Array, "B"]) -> KVCache:
        """The cache, once every layer is in."""
        if self.held:
            shares = _plan_over_layers(self.policy, self.held, self.specs[0], lengths)
            for layer in range(len(self.held)):
                tokens, evidence = self.held[layer]
                self.held[layer] = None  # each layer's full keys and values go as soon as they are packed
                self._pack(layer, tokens, evidence, lengths, shares[layer])
        # An exempt layer keeps every token, so it needs room though others are bounded.
        endless = all(
            each.endless(spec, layer) for layer, (each, spec) in enumerate(zip(self.policies, self.specs, strict=True))
        )
        room = ENDLESS if endless else self.specs[0].room
        # Placed too, or the first decode step would take a different program than all that follow.
        # Copied, since a cache is donated: caches of one pass, and the caller's own lengths, must not go with it.
        counters = place_rows(self.placement, (jnp.copy(lengths), jnp.int32(room)))
        return KVCache(self.storage, tuple(self.places), tuple(self.states), *counters)

    def _pack(self, layer: int, tokens: Tokens, evidence: Evidence, lengths: Int[Array, "B"], plan: Any) -> None:
        shared = tuple(self.storage[slot] for slot in sorted({where.slot for where in self.places if where.shared}))
        context = Context(jnp.int32(layer), lengths, self.specs[layer], plan, shared)
        entry = pack_layer(
            self.policies[layer],
            tokens,
            evidence,
            context,
            slots=self.slots[layer],
            dtype=self.dtype,
            placement=self.placement,
        )
        where, self.storage = place(entry.store, self.storage)
        self.places.append(where)
        self.states.append(entry.states)


@partial(jax.jit, static_argnames=("spec",))
def _plan_over_layers(
    policy: Policy, held: list[tuple[Tokens, Evidence]], spec: Spec, lengths: Int[Array, "B"]
) -> list[tuple[Any, ...]]:
    """For every layer, each acting stage's share of what it decides over the layers where it acts."""
    shares: list[tuple[Any, ...]] = [()] * len(held)
    for stage in policy.stages:
        acting = [layer for layer in range(len(held)) if stage.at(layer, len(held)) is not None]
        planned = stage.plan([stage.measure(*held[layer]) for layer in acting], spec, lengths)
        for layer, share in zip(acting, planned, strict=True):
            shares[layer] = (*shares[layer], share)
    return shares


def _whole(model: Decoder, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], plans: list[_Plan]):
    """The whole prompt at once; every plan takes each layer as it comes."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.where(index < lengths[:, None], index, -1)
    x = embed(model, tokens)
    for layer, block in enumerate(model.blocks):
        requests, rotated = _union(plans, layer)
        x, new, evidence = attend(block, x, positions, requests=requests, rotated=rotated)
        forms = {rotated: new}
        for plan in plans:
            # Each policy gets the form it keeps, so that it compiles to the same program as alone.
            form = plan.policies[layer].rotated
            if form not in forms:
                forms[form] = _reform(new, rotated=form)
            plan.take(layer, forms[form], evidence, lengths)
        # Bound any longer, they would live on beside the next layer's.
        del new, forms, evidence
    return x


def _chunked(model, tokens, lengths, plans, chunk: int, compress: str):
    """The prompt in chunks of `chunk` tokens, each attending to the past ones."""
    prompt = ChunkedPrompt(lengths, chunk)
    logits = jnp.zeros((tokens.shape[0], model.vocabulary), jnp.float32)
    for start in range(0, tokens.shape[1], chunk):
        piece = tokens[:, start : start + chunk]
        x = embed(model, jnp.pad(piece, ((0, 0), (0, chunk - piece.shape[1]))))
        last = start + chunk >= tokens.shape[1]
        for layer, block in enumerate(model.blocks):
            requests, rotated = _union(plans, layer)
            x = prompt.extend(layer, block, x, start, requests, rotated, plans[0].policy.renumber)
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
