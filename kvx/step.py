"""The layer loop of a decode step: append, read, update; everything between a model's pure functions happens here."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvx.cache import ENDLESS, KVCache
from kvx.context import Context, Spec
from kvx.decoder import Block, Decoder
from kvx.evidence import GENERATED, Evidence
from kvx.lending import takes
from kvx.loop import marked, project
from kvx.mesh import Placement, kernels_on, place_cache, place_rows, placement_of
from kvx.policy import Layer, Policy
from kvx.pytree import pytree
from kvx.query import Query, to_heads
from kvx.tokens import Tokens


@runtime_checkable
class Look(Protocol):
    """A look at what the layers of a step read, before anything is evicted; a pytree."""

    def at(self, layer: int) -> "Look":
        """The look at one layer, with that layer's arrays alone."""
        ...

    def __call__(self, store: Any, query: Query, out: Float[Array, "B G R T V"]) -> Any:
        """What is kept of the layer.

        Args:
            store: with the new tokens, as the attention saw it.
            out: the layer's attention output.
        """
        ...


@pytree
class Run:
    """A run of new tokens, as every layer needs it.

    Attributes:
        positions: true positions, -1 for a token that is not fed.
        marks: integers of the tokens, by name.
        next: each row's next true position before them.
        seen: and after them.
    """

    positions: Int[Array, "B T"]
    marks: dict[str, Int[Array, "B T"]]
    next: Int[Array, "B"]
    seen: Int[Array, "B"]


def decode(
    model: Decoder, token: Int[Array, "B"], cache: KVCache, policy: Policy, active: Bool[Array, "B"]
) -> tuple[Float[Array, "B N"], KVCache]:
    """One token for every row through all layers; a row that is not `active` feeds none."""
    logits, cache = decode_run(model, token[:, None], cache, policy, active[:, None])
    return logits[:, 0], cache


def decode_run(
    model: Decoder,
    tokens: Int[Array, "B T"],
    cache: KVCache,
    policy: Policy,
    active: Bool[Array, "B T"],
    *,
    provisional: bool = False,
) -> tuple[Float[Array, "B T N"], KVCache]:
    """A run of new tokens for every row through all layers.

    Appending before reading lets XLA write into the donated cache in place; the other order copies it at every step.
    A token that is not `active` is fed at position -1, which no store keeps. Under a jit the layers are unrolled into
    one program; outside of one, each is a program of its own, which takes over its part of the cache.

    Args:
        tokens: one for every policy; several only where its stores append them together.
        active: of a row's tokens, the active ones come first.
        provisional: the tokens may be taken back (`KVCache.crop`): no policy acts, and the next position stays.
    """
    logits, cache, _ = observed_run(model, tokens, cache, policy, active, provisional=provisional)
    return logits, cache


def observed_run(
    model: Decoder,
    tokens: Int[Array, "B T"],
    cache: KVCache,
    policy: Policy,
    active: Bool[Array, "B T"],
    look: Look | None = None,
    *,
    provisional: bool = False,
) -> tuple[Float[Array, "B T N"], KVCache, tuple[Any, ...]]:
    """As `decode_run`, and what `look` makes of each layer."""
    placement, layers, ends = placement_of(model), len(model.blocks), _ends(model)
    x, run = _begin(ends, tokens, active, cache.next, placement=placement)
    storage, states, carry, looks = list(cache.storage), [], None, []
    for index, (block, where) in enumerate(zip(model.blocks, cache.places, strict=True)):
        x, (storage[where.slot], state), carry, seen = _layer(
            policy.at(index, layers),
            block,
            replace(where, slot=0),
            (storage[where.slot], cache.states[index]),
            x,
            run,
            np.int32(index),
            carry,
            None if look is None else look.at(index),
            layers=layers,
            provisional=provisional,
            placement=placement,
        )
        states.append(state)
        looks.append(seen)
    logits, room = _end(ends, x, cache.room, provisional=provisional)
    after = cache.next if provisional else run.seen
    return logits, KVCache(tuple(storage), cache.places, tuple(states), after, room), tuple(looks)


@partial(jax.jit, static_argnames=("placement",))
def _begin(
    ends: Decoder,
    tokens: Int[Array, "B T"],
    active: Bool[Array, "B T"],
    next: Int[Array, "B"],
    *,
    placement: Placement | None,
) -> tuple[Float[Array, "B T E"], Run]:
    """The first layer's input."""
    tokens, active = place_rows(placement, (tokens, active))
    positions = jnp.where(active, next[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32), -1)
    marks = {"id": tokens, "label": jnp.full_like(tokens, GENERATED)}
    return ends.embed(tokens), Run(positions, marks, next, next + jnp.sum(active, axis=1, dtype=jnp.int32))


@takes("held", static=("layers", "provisional", "placement"))
def _layer(
    policy: Policy,
    block: Block,
    where: Any,
    held: tuple[Any, tuple[Any, ...]],
    x: Float[Array, "B T E"],
    run: Run,
    index: Int[Array, ""],
    carry: Any,
    look: Look | None,
    *,
    layers: int,
    provisional: bool,
    placement: Placement | None,
) -> tuple[Float[Array, "B T E"], tuple[Any, tuple[Any, ...]], Any, Any]:
    """One layer: a function of its own, so that equal ones are traced once, and compiled once where they may be.

    Args:
        where: the layer's place, as if its storage slot were the only one.
        held: what is in that slot, and the states of the policy's stages.
    """
    layer = Layer(where.load(held[:1]), held[1])
    context = Context(index, run.next, Spec(block.spec, layers, prompt=0, shortest=0, room=0))
    query, fresh = project(block, x, run.positions)
    wanted = policy.observe(prefill=False)
    fresh = policy.stats(marked(fresh, {name: run.marks[name] for name in wanted.marks}), None, context)
    with kernels_on(placement):
        out, layer, carry, seen = decode_layer(
            policy, layer, query, fresh, carry, run.seen, context, look, provisional=provisional
        )
    layer = place_cache(placement, layer, len(x), block.spec.kv_heads)
    (storage,) = where.save(held[:1], layer.store)
    return block.finish(x, to_heads(out).astype(x.dtype)), (storage, layer.states), carry, seen


@partial(jax.jit, static_argnames=("provisional",))
def _end(
    ends: Decoder, x: Float[Array, "B T E"], room: Int[Array, ""], *, provisional: bool
) -> tuple[Float[Array, "B T N"], Int[Array, ""]]:
    """Logits, and the room that is left."""
    return ends.unembed(x), room - jnp.where((room == ENDLESS) | provisional, 0, x.shape[1])


def _ends(model: Decoder) -> Decoder:
    """The model without its layers, which a program that needs none of them would only be handed."""
    ends = copy.copy(model)
    vars(ends)["blocks"] = nnx.List([])  # a module made outside this trace takes no attribute by assignment
    return ends


def decode_layer(
    policy: Policy,
    layer: Layer,
    query: Query,
    fresh: Tokens,
    carry: Any,
    seen: Int[Array, "B"],
    context: Context,
    look: Look | None = None,
    *,
    provisional: bool = False,
) -> tuple[Float[Array, "B G R T V"], Layer, Any, Any]:
    """One layer of a decode step, between a model's projections and its output.

    Args:
        fresh: the new tokens, with the policy's statistics.
        carry: what the layers below handed up.
        seen: the next true position.

    Returns:
        The attention output, the layer's cache after the step, what goes up the layers, and what `look` made of it.
    """
    if not provisional:
        layer = Layer(policy.settle(layer.store), layer.states)
    layer = policy.before(layer, query, context)
    store = layer.store.append(fresh)
    part, carry = policy.read(store, query, carry, context)
    layer = Layer(store, layer.states)
    out = policy.recall(part, layer.states, query, context).out
    looked = None if look is None else look(store, query, out)
    if not provisional:
        wanted = policy.observe(prefill=False)
        rows = store.probabilities(query, part.lse) if wanted.rows else None
        evidence = Evidence(seen, rows, queries=query.rotated if wanted.queries else None)
        layer = policy.step(layer, evidence, context)
    return out, layer, carry, looked


def settle(model: Decoder, cache: KVCache, policy: Policy) -> KVCache:
    """Before a provisional run, what a decode step does first: every store is rewritten where its policy has waited."""
    storage = cache.storage
    for index, where in enumerate(cache.places):
        here = policy.at(index, len(model.blocks))
        storage = where.save(storage, here.settle(where.load(storage)))
    return replace(cache, storage=storage)
