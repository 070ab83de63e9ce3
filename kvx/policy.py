"""Policies: a tuple of stages (`kvx.stage`); a policy's behaviour is the fold over their hooks."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int8

from kvx.buckets import round_up
from kvx.context import Context, Layout, Spec
from kvx.decoder import AttentionSpec
from kvx.errors import BadInput
from kvx.evidence import Evidence, Requests
from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stage import overrides
from kvx.stores.dense import Dense
from kvx.stores.layout import layout_for
from kvx.tokens import Tokens


@pytree
class Layer:
    """One layer's cache: its store, and what each stage of the policy carries between steps."""

    store: Any
    states: tuple[Any, ...] = ()


@pytree
class Policy:
    """A composition of stages. Hyperparameters are static; learned arrays are leaves.

    Attributes:
        stages: selections first, then at most one that packs.
        text: how it is written, e.g. "snapkv(budget=256)+kivi(bits=2)"; `kvx.parse_policy` reads it back.
    """

    stages: tuple[Any, ...]
    text: str = static("policy")

    def at(self, layer: int, layers: int) -> "Policy":
        """The policy of one layer, without the stages that skip it."""
        stages = [stage.at(layer, layers) for stage in self.stages]
        return replace(self, stages=tuple(stage for stage in stages if stage is not None))

    def check(self, layers: Sequence[AttentionSpec]) -> None:
        """Refuse a model that one of the stages cannot serve.

        Raises:
            BadInput: with that stage's reason.
        """
        for stage in self.stages:
            acting = {at: each for at, each in enumerate(layers) if stage.at(at, len(layers)) is not None}
            if reason := stage.objection(acting):
                raise BadInput(f"policy={self.text} {reason}")

    @property
    def bounded(self) -> bool:
        """Whether this cache stays within its budget however long the generation; ask it of each layer (`at`)."""
        return any(stage.bounded for stage in self.stages)

    @property
    def lays_out(self) -> bool:
        """Whether it has an opinion on where a prompt's tokens stand."""
        return any(overrides(stage, "layout") for stage in self.stages)

    @property
    def rotated(self) -> bool:
        """Whether its store keeps rotated keys."""
        return all(stage.rotated for stage in self.stages)

    @property
    def renumber(self) -> bool:
        """Whether positions are assigned by place in the cache."""
        return any(stage.renumber for stage in self.stages)

    @property
    def decides(self) -> str:
        """The latest of its stages' times: "layer", "cascade" or "end"."""
        times = ("layer", "cascade", "end")
        return max((stage.decides for stage in self.stages), key=times.index, default="layer")

    @property
    def alone(self) -> bool:
        """Whether no other policy can share its pass over the prompt: it changes what later layers compute."""
        return self.lays_out or any(stage.thins for stage in self.stages)

    @property
    def measures(self) -> bool:
        """Whether only the data decide how many slots a layer needs."""
        return any(stage.measures for stage in self.stages)

    @property
    def undoes(self) -> int | None:
        """The most new tokens that can be taken back as if they had never come; None: any number."""
        if self.renumber or any(stage.acts for stage in self.stages):
            return 0
        return min((stage.undoes for stage in self.stages if stage.stores), default=None)

    @property
    def narrows(self) -> bool:
        """Whether its cache has a narrower view to draft with."""
        return any(stage.narrows for stage in self.stages)

    @property
    def by_kind(self) -> bool:
        """Whether it can use what a tokenizer knows of token ids (`with_kinds`)."""
        return any(stage.by_kind for stage in self.stages)

    def with_kinds(self, table: Int8[np.ndarray, "N"] | Int8[Array, "N"]) -> "Policy":
        """The policy, told the kind of every token id: `with_kinds(kvx.models.token_kinds.token_kinds(tokenizer))`."""
        kinds = jnp.asarray(table)
        return replace(self, stages=tuple(stage.with_kinds(kinds) for stage in self.stages))

    @property
    def selects_by_measure(self) -> bool:
        """Whether what stays, and not only the room for it, follows what a stage measures."""
        return any(stage.measures and overrides(stage, "keep") for stage in self.stages)

    @property
    def nbytes(self) -> int:
        """Bytes of its learned arrays (filters, codebooks); reported beside the cache's bytes, not in them."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def evicts(self) -> bool:
        """Whether slots become free while decoding."""
        return any(stage.evicts for stage in self.stages)

    def observe(self, prefill: bool) -> Requests:
        """The union of what its stages read."""
        return reduce(or_, (stage.observe(prefill) for stage in self.stages), Requests())

    def capacity(self, spec: Spec, layer: int) -> int:
        """Static slots per head for what is kept of the prompt, room for new tokens not included."""
        limits = [stage.capacity(spec, layer) for stage in self.stages]
        return min([spec.prompt, *(limit for limit in limits if limit is not None)])

    def slots(self, spec: Spec, layer: int) -> int:
        """Static slots per head of the finished cache: what is kept, and room for what comes.

        A stage that acts while decoding needs slots beyond its budget, since a fresh token is seen before anything
        leaves; other policies keep every generated token.
        """
        evicting = [stage for stage in self.stages if stage.evicts]
        growths = [stage.growth(spec, layer) for stage in self.stages]
        coming = min([spec.room, *(growth for growth in growths if growth is not None)])
        return round_up(min([self.capacity(spec, layer) + coming, *_bounds(evicting, spec, layer)]))

    def endless(self, spec: Spec, layer: int) -> bool:
        """Whether these slots serve any number of new tokens; not where a budget exceeds prompt and room."""
        bounds = _bounds([stage for stage in self.stages if stage.bounded], spec, layer)
        return bool(bounds) and min(bounds) <= self.slots(spec, layer)

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> Tokens:
        """The tokens with every stage's statistics."""
        stats = dict(tokens.stats)
        for stage in self.stages:
            stats |= stage.stats(tokens, evidence, context)
        return replace(tokens, stats=stats)

    def select(
        self, tokens: Tokens, evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], tuple[Any, ...]]:
        """What stays of the tokens at hand, and each stage's state."""
        tokens = self.stats(tokens, evidence, context)
        return self.keep(tokens, tokens.present, evidence, context)

    def keep(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], tuple[Any, ...]]:
        """What stays of the tokens in `mask`, whose statistics they carry, and each stage's state."""
        states = []
        for stage, here in zip(self.stages, self._contexts(context), strict=True):
            tokens, mask, state = stage.keep(tokens, mask, evidence, here)
            states.append(state)
        return tokens, mask, tuple(states)

    def prefill(self, tokens: Tokens, evidence: Evidence, context: Context, slots: int) -> Layer:
        """One layer's cache from its prompt."""
        tokens, mask, states = self.select(tokens, evidence, context)
        return Layer(self.pack(tokens, mask, evidence, context, slots), states)

    def pack(self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context, slots: int) -> Any:
        """The store of what was selected, by the last stage that answers; dense if none does."""
        # Only statistics that a decode step will go on with travel into the store.
        tokens = tokens.with_only({name for stage in self.stages for name in stage.stats(tokens, None, context)})
        packed = [
            stage.pack(tokens, mask, slots, evidence, here)
            for stage, here in zip(self.stages, self._contexts(context), strict=True)
        ]
        answers = [store for store in packed if store is not None]
        if answers:
            return answers[-1]
        return Dense.pack(tokens.with_form(self.rotated), mask, slots, layout=layout_for(tokens))

    def need(self, tokens: Tokens, evidence: Evidence, context: Context) -> Int[Array, ""]:
        """Slots that a stage which `measures` asks for."""
        tokens, mask, states = self.select(tokens, evidence, context)
        asked = [
            stage.need(tokens, mask, state, context)
            for stage, state in zip(self.stages, states, strict=True)
            if stage.measures
        ]
        return reduce(jnp.maximum, asked)

    def _contexts(self, context: Context) -> list[Context]:
        """Each stage's own share of what was planned over all layers."""
        plans = context.plan or (None,) * len(self.stages)
        return [replace(context, plan=plan, evicting=self.evicts) for plan in plans]

    def settle(self, store: Any) -> Any:
        """The same store, with what waited until every token was there to stay done."""
        return reduce(lambda settled, stage: stage.settle(settled), self.stages, store)

    def before(self, layer: Layer, query: Query, context: Context) -> Layer:
        """One layer's cache with a slot freed for the fresh token, where a stage does so before attention."""
        store, states = layer.store, []
        for stage, state in zip(self.stages, layer.states, strict=True):
            store, state = stage.before(store, state, query, context)
            states.append(state)
        return Layer(store, tuple(states))

    def read(self, store: Any, query: Query, carry: Any, context: Context) -> tuple[Partial, Any]:
        """Attention of a decode step, by the last stage that has its own way to read, and what goes up the layers."""
        for stage in reversed(self.stages):
            answer = stage.read(store, query, carry, context)
            if answer is not None:
                return answer
        return store.read(query), carry

    def recall(self, part: Partial, states: tuple[Any, ...], query: Query, context: Context) -> Partial:
        """Attention over the store, joined by what stages still know of tokens that left it."""
        known = [stage.recall(state, query, context) for stage, state in zip(self.stages, states, strict=True)]
        parts = [each for each in known if each is not None]
        return merge_partials(part, *parts) if parts else part

    def layout(self, labels: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Layout | None:
        """Where the prompt's tokens stand, by the first stage that has an opinion."""
        layouts = (stage.layout(labels, lengths) for stage in self.stages)
        return next((layout for layout in layouts if layout is not None), None)

    def remaining(self, spec: Spec, layer: int) -> int | None:
        """The most tokens of a row that go on to the next layer; None: all."""
        limits = [stage.remaining(spec, layer) for stage in self.stages]
        return min((limit for limit in limits if limit is not None), default=None)

    def thin(self, tokens: Tokens, evidence: Evidence, context: Context) -> Bool[Array, "B T"]:
        """Which tokens go on to the next layer."""
        thinning = [stage.thin(tokens, evidence, context) for stage in self.stages if stage.thins]
        return reduce(jnp.logical_and, thinning)

    def step(self, layer: Layer, evidence: Evidence, context: Context) -> Layer:
        """One layer's cache after a decode step has attended."""
        store, states = layer.store, []
        for stage, state in zip(self.stages, layer.states, strict=True):
            store, state = stage.step(store, state, evidence, context)
            states.append(state)
        return Layer(store, tuple(states))


def _bounds(stages: list[Any], spec: Spec, layer: int) -> list[int]:
    """The most tokens, a fresh one included, that each of the stages lets a head hold while decoding."""
    limits = [(stage.capacity(spec, layer), stage.overflow) for stage in stages]
    return [limit + overflow for limit, overflow in limits if limit is not None]
