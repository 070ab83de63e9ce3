"""The selection stage: score x budget x losers x schedule, the whole of grid 1 in one place."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.context import Activations, Context, Spec
from kvx.decoder import AttentionSpec
from kvx.evidence import Evidence, Requests
from kvx.kernels.merge_partials import Partial
from kvx.parts.amounts import Amount, Slots
from kvx.parts.losers import Drop
from kvx.parts.ranking import top
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stage import Stage
from kvx.tokens import Tokens


@pytree
class Evict(Stage):
    """Keep the tokens with the highest scores, as many as the budget gives each head.

    Attributes:
        score: what a token is worth (`kvx.parts.scores`).
        budget: how many tokens each layer and head keeps (`kvx.parts.budgets`).
        losers: what happens to the others (`kvx.parts.losers`).
        sinks: the first tokens of the text, protected; `Share(1.0)` protects the whole prompt.
        recent: the last tokens, protected; None: none.
        first: a score that fills a share of the budget before `score` decides the rest; None: `score` decides alone.
        share: of the budget, for `first`; the recent tokens count among them.
        across: "head": every KV head ranks for itself; "layer": one ranking, the mean over heads.
        every: 0: act once, after the prompt (generated tokens come on top). n: also while decoding, whenever a head
            holds n tokens too many, which then leave at once (the budget is the total).
        skip: layers left alone; negative ones count from the top.
    """

    score: Any
    budget: Any
    losers: Any = Drop()
    sinks: Amount = static(Slots(0))
    recent: Amount | None = static(None)
    first: Any = None
    share: float = static(0.0)
    across: str = static("head")
    every: int = static(0)
    skip: tuple[int, ...] = static(())

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return self.evicts and not self.budget.grows

    @property
    def evicts(self) -> bool:
        return self.every > 0

    @property
    def acts(self) -> bool:  # type: ignore[override]
        return self.every > 0

    @property
    def overflow(self) -> int:  # type: ignore[override]
        return self.every

    @property
    def scores(self) -> tuple[Any, ...]:
        """Every score it reads; one whose statistics serve another comes first."""
        return (self.score,) if self.first is None else (self.score, self.first)

    def at(self, layer: int, layers: int) -> "Evict | None":
        return None if layer in {index % layers for index in self.skip} else self

    @property
    def decides(self) -> str:  # type: ignore[override]
        return self.budget.decides

    def measure(self, tokens: Tokens, evidence: Evidence) -> Any:
        return self.budget.measure(tokens, evidence)

    def plan(self, measures: list[Any], spec: Spec, lengths: Int[Array, "B"], ends: Int[Array, "B"]) -> list[Any]:
        return self.budget.allocate(measures, spec, lengths, ends)

    def observe(self, prefill: bool) -> Requests:
        wanted = reduce(or_, (score.observe(prefill) for score in self.scores)) | self.losers.observe(prefill)
        if prefill:
            return wanted | self.budget.observe()
        return wanted if self.every else Requests()

    @property
    def learns(self) -> bool:  # type: ignore[override]
        return self.score.learns

    def digest(self, activations: Activations) -> Any:
        return self.score.digest(activations)

    def calibrate(self, digests: list[Any]) -> "Evict":
        return replace(self, score=self.score.calibrate(digests))

    def objection(self, layers: Mapping[int, AttentionSpec]) -> str | None:
        return super().objection(layers) or self.losers.objection(layers)

    def capacity(self, spec: Spec, layer: int) -> int:
        self.score.check(spec)
        self.losers.check(spec)
        protected = self.sinks.most(spec.prompt) + (self.recent.most(spec.prompt) if self.recent else 0)
        return max(self.budget.capacity(spec, layer), protected)

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        if evidence is None and not self.every:
            return {}
        return {
            name: stat
            for part in (*self.scores, self.losers)
            for name, stat in part.stats(tokens, evidence, context).items()
        }

    def keep(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], Any]:
        sinks = self.sinks.of(context.lengths, context.spec.prompt)
        recent = self.budget.recent(self.recent, sinks, context)
        scores = self._ranked(tokens, evidence, sinks, recent)
        protected = jnp.isposinf(scores)
        counts = self.budget.counts(jnp.where(mask, scores, -jnp.inf), mask, context)
        counts = self.budget.at_least(counts, jnp.sum(protected & mask, axis=-1))
        filled = self._filled(scores, tokens, mask, evidence, counts, sinks, recent)
        kept = top(filled, mask, counts)
        tokens, carried = self.losers.settle(tokens, kept, mask & ~kept, evidence, context)
        return tokens, kept, (counts, sinks, recent, carried)

    def before(self, store: Any, state: Any, query: Query, context: Context) -> tuple[Any, Any]:
        if not self.every:
            return store, state
        store, carried = self.losers.before(store, state[-1], context)
        return store, (*state[:-1], carried)

    def step(self, store: Any, state: Any, evidence: Evidence, context: Context) -> tuple[Any, Any]:
        if not self.every:
            return store, state
        counts, sinks, recent, carried = state
        before = store.stats
        changed = [part.update(before, evidence) for part in (*self.scores, self.losers)]
        store = store.with_stats({**before, **{name: stat for stats in changed for name, stat in stats.items()}})
        tokens = store.tokens()
        counts = self.budget.grown(counts, evidence)
        scores = self._ranked(tokens, evidence, sinks, recent)
        scores = self._filled(scores, tokens, tokens.present, evidence, counts, sinks, recent)
        excess = jnp.sum(tokens.present, axis=-1) - counts
        excess = jnp.where(excess >= self.every, excess, 0)
        store, carried = self.losers.step(store, carried, scores, excess, self.every, context)
        return store, (counts, sinks, recent, carried)

    @property
    def unchained(self) -> bool:  # type: ignore[override]
        return self.losers.unchained

    @property
    def values_apart(self) -> bool:  # type: ignore[override]
        return self.losers.values_apart

    @property
    def recalls(self) -> bool:  # type: ignore[override]
        return self.losers.recalls

    def recall(self, state: Any, query: Query, context: Context) -> Partial | None:
        return self.losers.recall(state[-1], query, context) if self.recalls else None

    def rank(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G T"]:
        """The score, or its mean over the layer's heads."""
        scores = self.score.rank(tokens, evidence)
        if self.across == "head":
            return scores
        return jnp.broadcast_to(jnp.mean(scores, axis=1, keepdims=True), scores.shape)

    def _ranked(
        self, tokens: Tokens, evidence: Evidence, sinks: Int[Array, "B"], recent: Int[Array, "B"]
    ) -> Float[Array, "B G T"]:
        """The score; +inf for sinks and the most recent tokens, by true position."""
        last = (evidence.seen - recent)[:, None, None]
        protected = tokens.present & ((tokens.positions < sinks[:, None, None]) | (tokens.positions >= last))
        return jnp.where(protected, jnp.inf, self.rank(tokens, evidence))

    def _filled(
        self,
        scores: Float[Array, "B G T"],
        tokens: Tokens,
        mask: Bool[Array, "B G T"],
        evidence: Evidence,
        counts: Int[Array, "B G"],
        sinks: Int[Array, "B"],
        recent: Int[Array, "B"],
    ) -> Float[Array, "B G T"]:
        """The score, +inf also for those of the others that the first score takes."""
        if self.first is None:
            return scores
        others = mask & ~jnp.isposinf(scores)
        places = jnp.maximum(self.budget.part(self.share, counts, sinks) - recent[:, None], 0)
        taken = top(self.first.rank(tokens, evidence), others, places, tokens.positions)
        return jnp.where(taken, jnp.inf, scores)
