"""Policies: a tuple of stages, each a frozen pytree with optional hooks; a policy's behaviour is the fold over them.

Selection is a mask and never gathered tokens: that one choice lets rectangular, ragged, tiered and packed stores all
follow the same selections. A stage refines the mask (`keep`), or says how what is kept is stored (`pack`; the last
stage that answers wins), or acts after each decode step (`step`).
"""

from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Shaped

from kvx.decoder import AttentionSpec
from kvx.errors import BadInput
from kvx.evidence import Evidence, Requests
from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stores.base import Store
from kvx.stores.dense import Dense
from kvx.tokens import Tokens

LANE = 16
"""Capacities are rounded up to this many slots: the sublane tile of a 16-bit array on a TPU."""


@dataclass(frozen=True)
class Spec:
    """Static facts under which one layer's cache is made.

    Attributes:
        attention: the layer's attention.
        layers: layers of the model.
        prompt: the most tokens a row's prompt may hold.
        shortest: the fewest tokens a row's prompt may hold.
        room: tokens to come after the prompt for which there must be slots.
    """

    attention: AttentionSpec
    layers: int
    prompt: int
    shortest: int
    room: int


@pytree
class Context:
    """Where a hook is called: the static spec and what only the run knows.

    Attributes:
        layer: index of the layer, traced, so that equal layers share one compiled body.
        lengths: length of each row's whole prompt, also while only a part of it has been seen.
        plan: this stage's and layer's share of a decision over all layers (`Stage.plan`); None if it decides by layer.
        storage: what earlier layers' stores put into the cache, for stores that share arrays.
        evicting: static; some stage of the policy frees slots while decoding (`Stage.evicts`).
    """

    layer: Int[Array, ""]
    lengths: Int[Array, "B"]
    spec: Spec = static()
    plan: Any = None
    storage: tuple[Any, ...] = ()
    evicting: bool = static(False)


@pytree
class Activations:
    """What one layer computes, for calibration: N tokens, the same for every head.

    A sample over many texts; or, for a stage with a text of its own (`Stage.probe`), all tokens of that in order.

    Attributes:
        queries: rotated, R query heads for each KV head.
        keys: rotated.
        values: values.
        spec: the layer's attention.
    """

    queries: Float[Array, "G R N D"]
    keys: Float[Array, "G N D"]
    values: Float[Array, "G N V"]
    spec: AttentionSpec = static()


class Stage:
    """One step of a policy. Every hook has a neutral default; a subclass overrides what it is about.

    Class attributes:
        bounded: the cache never grows past the budget, however long the generation (it acts while decoding).
        overflow: if bounded, tokens beyond its budget that a head may hold before it acts, the fresh one included.
        rotated: False if its store keeps keys unrotated.
        renumber: positions are assigned by place in the cache instead of by place in the text.
        decides: "layer" (inside the layer loop), "cascade" (inside it, and again whenever a later layer comes), or
            "end" (when the evidence of all layers is known).
        stores: it answers `pack`, so that nothing can follow it in a chain.
        learns: it has arrays or hyperparameters that `kvx.calibrate` fills.
        append_only: its store cannot free slots for reuse, so that nothing that evicts while decoding can precede it.
        measures: how many slots it needs is known only when the layer's evidence is (`need`).
        thins: tokens leave the residual stream after its layers (`thin`), so that no other policy can share the pass.
        recalls: its state (`recall`) or a tier of its store holds what became of tokens that left, so that it must see
            all of them leave.
        undoes: of a stage that stores: the most new tokens its store appends together and takes back (`crop`).
        narrows: its store has a narrower view of the same arrays to draft with (`narrow`).
        aligned: its layers have to hold the same tokens in the same slots, so that nothing that selects can precede it.
        unchained: it relies on positions or slots that no other stage knows of, so that nothing can be chained with it.
        by_kind: it can use a table of what each token id is (`with_kinds`).
    """

    bounded: bool = False
    overflow: int = 1
    rotated: bool = True
    renumber: bool = False
    decides: str = "layer"
    stores: bool = False
    learns: bool = False
    append_only: bool = False
    measures: bool = False
    thins: bool = False
    recalls: bool = False
    aligned: bool = False
    unchained: bool = False
    by_kind: bool = False
    undoes: int = 0
    narrows: bool = False

    @property
    def acts(self) -> bool:
        """Whether it does anything at a decode step; a stage with such a hook may know when it does not."""
        return any(_overrides(self, hook) for hook in ("before", "read", "step"))

    @property
    def evicts(self) -> bool:
        """Whether it frees slots while decoding, so that its `capacity` limits a cache as long as there is room.

        A stage may do so and yet not be `bounded`: one whose budget grows with the text.
        """
        return self.bounded

    def at(self, layer: int, layers: int) -> "Stage | None":
        """This stage in one layer; None where it does not act."""
        return self

    def observe(self, prefill: bool) -> Requests:
        """The evidence this stage reads, at prefill or at a decode step."""
        return Requests()

    def capacity(self, spec: Spec, layer: int) -> int | None:
        """The most tokens a row and head may keep, however many there are; None: no limit of its own.

        Called before any work: the place to refuse what cannot run on this model (BadInput).
        """
        return None

    def growth(self, spec: Spec, layer: int) -> int | None:
        """The most of the `spec.room` tokens to come that a row and head hold at a time; None: all of them."""
        return None

    def layout(self, labels: Int[Array, "B T"], lengths: Int[Array, "B"]) -> "Layout | None":
        """Where the prompt's tokens stand and which see each other, by their labels; None: in order, all of them."""
        return None

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        """What to keep with each token, given the evidence so far (None: a token just decoded, not yet attended)."""
        return {}

    def measure(self, tokens: Tokens, evidence: Evidence) -> Any:
        """For `decides = "end"`: what this layer contributes to the decision over all layers."""
        return None

    def plan(self, measures: list[Any], spec: Spec, lengths: Int[Array, "B"], ends: Int[Array, "B"]) -> list[Any]:
        """For `decides = "end"`: each layer's share of the decision, from every layer's measure.

        Args:
            ends: tokens that a row will hold at most: its prompt and what was asked for after it.
        """
        return [None] * len(measures)

    def ascend(self, carry: Any, tokens: Tokens, evidence: Evidence, context: Context) -> Any:
        """For `decides = "cascade"`: what the layers so far hold, once this layer's prompt is in (None: no layer yet).

        One jitted body for all layers: the carry keeps its shapes from the second layer on.
        """
        return carry

    def land(self, carry: Any, context: Context) -> tuple[Store, Any]:
        """For `decides = "cascade"`: one layer's store and state, from what all layers hold."""
        raise NotImplementedError

    def need(self, tokens: Tokens, mask: Bool[Array, "B G T"], state: Any, context: Context) -> Int[Array, ""]:
        """For `measures`: slots that hold what this stage kept, and what will come."""
        raise NotImplementedError

    def remaining(self, spec: Spec, layer: int) -> int | None:
        """For `thins`: the most tokens of a row that go on to the next layer; None: all that came."""
        return None

    def thin(self, tokens: Tokens, evidence: Evidence, context: Context) -> Bool[Array, "B T"]:
        """For `thins`: which tokens go on to the next layer (those of a row's own, in any layer of `remaining`)."""
        raise NotImplementedError

    def keep(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], Any]:
        """Refine the mask (and, when losers are merged, the tokens); the third value is this stage's state."""
        return tokens, mask, None

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Store | None:
        """The store that holds what is kept; None: no opinion."""
        return None

    def settle(self, store: Any) -> Any:
        """When every token held is there to stay: what rewrites its store without changing what is read."""
        return store

    def before(self, store: Any, state: Any, query: Query, context: Context) -> tuple[Any, Any]:
        """Before a fresh token is appended: free a slot for it by its query."""
        return store, state

    def read(self, store: Any, query: Query, carry: Any, context: Context) -> tuple[Partial, Any] | None:
        """Attention of a decode step, and what this layer hands up to the next ones of the same step.

        Args:
            carry: what the layers below handed up; None in the first.

        Returns:
            None: no opinion, the store reads as it does.
        """
        return None

    def recall(self, state: Any, query: Query, context: Context) -> Partial | None:
        """For `recalls`: attention over tokens that left the store, by what this stage's state holds of them.

        It joins the store's under one softmax; the evidence that a decode step collects is about the store alone.
        """
        return None

    def step(self, store: Any, state: Any, evidence: Evidence, context: Context) -> tuple[Any, Any]:
        """After a decode step has attended: update statistics, choose and free the next victim."""
        return store, state

    def with_kinds(self, table: Int8[Array, "N"]) -> "Stage":
        """For `by_kind`: with the kind of every token id (`kvx.kinds`)."""
        return self

    def probe(self, vocabulary: int, longest: int, seed: int) -> Int[np.ndarray, "T"] | None:
        """For `learns`: a text of its own to calibrate on, in place of the caller's; None: a sample of those.

        Args:
            vocabulary: number of token ids.
            longest: the most tokens it may have.
            seed: of anything random in it.
        """
        return None

    def digest(self, activations: Activations) -> Any:
        """For `learns`: what calibration keeps of one layer's activations; traced, layer by layer."""
        return None

    def calibrate(self, digests: list[Any]) -> "Stage":
        """With its learned arrays, or hyperparameters, filled from every layer's digest (`kvx.calibrate`)."""
        return self

    @property
    def learned(self) -> dict[str, Any]:
        """Hyperparameters that calibration filled, as the recipe's text writes them; arrays are not among them."""
        return {}


@pytree
class Layout:
    """Where the tokens of a prompt stand.

    Attributes:
        positions: true positions, -1 for padding; tokens that do not see each other may share them.
        segments: labels by which `visibility` tells.
        visibility: entry (a, b): whether a token of label a sees one of label b; None: only those of its own label,
            and of label `SHARED` (`kvx.kernels.logits`).
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    visibility: Bool[Array, "N N"] | None = None


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

    @property
    def bounded(self) -> bool:
        """Whether this cache stays within its budget however long the generation; ask it of each layer (`at`)."""
        return any(stage.bounded for stage in self.stages)

    @property
    def lays_out(self) -> bool:
        """Whether it has an opinion on where a prompt's tokens stand."""
        return any(_overrides(stage, "layout") for stage in self.stages)

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

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context, slots: int
    ) -> Any:
        """The store of what was selected, by the last stage that answers; dense if none does."""
        # Only statistics that a decode step will go on with travel into the store.
        tokens = tokens.with_only({name for stage in self.stages for name in stage.stats(tokens, None, context)})
        packed = [
            stage.pack(tokens, mask, slots, evidence, here)
            for stage, here in zip(self.stages, self._contexts(context), strict=True)
        ]
        answers = [store for store in packed if store is not None]
        return answers[-1] if answers else Dense.pack(tokens.with_form(self.rotated), mask, slots)

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


def chain(*policies: Policy) -> Policy:
    """One policy from several: any number of selections, then at most one that stores.

    Raises:
        BadInput: nothing to chain, a policy that stands alone, a selection after a store, or one before a stage whose
            layers hold the same tokens.
    """
    if not policies:
        raise BadInput("chain: no policies given; allowed: one or more")
    stages = tuple(stage for policy in policies for stage in policy.stages)
    for policy in policies:
        if len(policies) > 1 and any(stage.unchained for stage in policy.stages):
            raise BadInput(f"chain: {policy.text!r} relies on slots and positions of its own; allowed: it alone")
    if stages and stages[-1].append_only and any(stage.evicts for stage in stages):
        raise BadInput(
            f"chain: {policies[-1].text!r} cannot evict at every step; allowed before it: policies that act once, "
            "after the prompt"
        )
    for place, policy in enumerate(policies):
        before = [stage for earlier in policies[:place] for stage in earlier.stages]
        if any(stage.aligned for stage in policy.stages) and any(map(_selects, before)):
            raise BadInput(
                f"chain: {policy.text!r} needs the same tokens in the same slots of all layers, and before it each "
                "layer selects its own; allowed before it: policies that keep every token"
            )
    for policy in policies[:-1]:
        if any(stage.stores for stage in policy.stages):
            raise BadInput(
                f"chain: {policy.text!r} says how tokens are stored, so nothing can follow it; allowed: selections "
                "first, then at most one policy that stores"
            )
    return Policy(stages, "+".join(policy.text for policy in policies))


def _selects(stage: Stage) -> bool:
    return stage.thins or _overrides(stage, "keep")


def _bounds(stages: list[Any], spec: Spec, layer: int) -> list[int]:
    """The most tokens, a fresh one included, that each of the stages lets a head hold while decoding."""
    limits = [(stage.capacity(spec, layer), stage.overflow) for stage in stages]
    return [limit + overflow for limit, overflow in limits if limit is not None]


def _overrides(stage: Stage, hook: str) -> bool:
    return getattr(type(stage), hook) is not getattr(Stage, hook)


def round_up(count: int, multiple: int = LANE) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple
