"""One policy's cache in the making: layers come one by one, and are packed at the time the policy decides."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvx.buckets import part, round_up
from kvx.cache import ENDLESS, KVCache
from kvx.context import Context, Spec
from kvx.evidence import MARKS, Evidence
from kvx.inputs import traced
from kvx.loop import pack_layer
from kvx.mesh import Placement, place_cache, place_rows
from kvx.places import place
from kvx.policy import Layer, Policy
from kvx.tokens import Tokens


class CacheBuilder:
    """One policy's cache in the making: finished layers, or all layers' material if it decides at the end."""

    def __init__(self, policy: Policy, specs: list[Spec], wanted: int, dtype: Any, placement: Placement | None):
        self.wanted = jnp.int32(wanted)  # data, unlike the room it is rounded up to: it compiles nothing
        self.specs, self.dtype, self.placement = specs, dtype, placement
        policy.check([spec.attention for spec in specs])
        self.policies = [policy.at(layer, len(specs)) for layer in range(len(specs))]
        # Also refuses impossible budgets, before any work.
        layers = list(enumerate(zip(self.policies, specs, strict=True)))
        self.slots = [each.slots(spec, layer) for layer, (each, spec) in layers]
        self.capacities = [each.capacity(spec, layer) for layer, (each, spec) in layers]
        # An exempt layer keeps every token, so it needs room though others are bounded.
        self.room = ENDLESS if all(each.endless(spec, layer) for layer, (each, spec) in layers) else specs[0].room
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
        # Placed too, or the first decode step would take a different program than all that follow.
        # Copied, since a cache is donated: caches of one pass, and the caller's own lengths, must not go with it.
        counters = place_rows(self.placement, (jnp.copy(seen), jnp.int32(self.room)))
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
