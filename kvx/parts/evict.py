"""The selection stage: score x budget x losers x schedule, the whole of grid 1 in one place."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.evidence import Evidence, Requests
from kvx.parts.amounts import Amount
from kvx.parts.losers import Drop
from kvx.parts.ranking import top
from kvx.policy import Activations, Context, Spec, Stage
from kvx.pytree import pytree, static
from kvx.tokens import Tokens


@pytree
class Evict(Stage):
    """Keep the tokens with the highest scores, as many as the budget gives each head.

    Attributes:
        score: what a token is worth (`kvx.parts.scores`).
        budget: how many tokens each layer and head keeps (`kvx.parts.budgets`).
        losers: what happens to the others (`kvx.parts.losers`).
        sinks: the first tokens of the text, protected.
        recent: the last tokens, protected; None: none.
        across: "head": every KV head ranks for itself; "layer": one ranking, the mean over heads.
        every_step: act after the prompt and after every decode step (the budget is the total), instead of once after
            the prompt (generated tokens come on top).
        skip: layers left alone; negative ones count from the top.
    """

    score: Any
    budget: Any
    losers: Any = Drop()
    sinks: int = static(0)
    recent: Amount | None = static(None)
    across: str = static("head")
    every_step: bool = static(False)
    skip: tuple[int, ...] = static(())

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return self.every_step

    def at(self, layer: int, layers: int) -> "Evict | None":
        return None if layer in {index % layers for index in self.skip} else self

    @property
    def decides(self) -> str:  # type: ignore[override]
        return self.budget.decides

    def measure(self, tokens: Tokens, evidence: Evidence) -> Any:
        return self.budget.measure(tokens, evidence)

    def plan(self, measures: list[Any], spec: Spec, lengths: Int[Array, "B"]) -> list[Any]:
        return self.budget.allocate(measures, spec, lengths)

    def observe(self, prefill: bool) -> Requests:
        if prefill:
            return self.score.observe(prefill) | self.budget.observe()
        return self.score.observe(prefill) if self.every_step else Requests()

    @property
    def learns(self) -> bool:  # type: ignore[override]
        return self.score.learns

    def digest(self, activations: Activations) -> Any:
        return self.score.digest(activations)

    def calibrate(self, digests: list[Any]) -> "Evict":
        return replace(self, score=self.score.calibrate(digests))

    def capacity(self, spec: Spec, layer: int) -> int:
        self.score.check(spec)
        protected = self.sinks + (self.recent.most(spec.prompt) if self.recent else 0)
        return max(self.budget.capacity(spec, layer), protected)

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Float[Array, "B G T"]]:
        if evidence is None and not self.every_step:
            return {}
        return self.score.stats(tokens, evidence, context)

    def keep(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], Any]:
        recent = self.budget.recent(self.recent, self.sinks, context)
        protected = self.protected(tokens, evidence, recent)
        scores = jnp.where(protected, jnp.inf, self.rank(tokens, evidence))
        counts = self.budget.counts(jnp.where(mask, scores, -jnp.inf), mask, context)
        counts = self.budget.at_least(counts, jnp.sum(protected & mask, axis=-1))
        kept = top(scores, mask, counts)
        tokens, carried = self.losers.settle(tokens, kept, mask & ~kept, evidence)
        return tokens, kept, (counts, recent, carried)

    def step(self, store: Any, state: Any, evidence: Evidence, context: Context) -> tuple[Any, Any]:
        if not self.every_step:
            return store, state
        counts, recent, carried = state
        store = store.with_stats(self.score.update(store.stats, evidence))
        tokens = store.tokens()
        scores = jnp.where(self.protected(tokens, evidence, recent), jnp.inf, self.rank(tokens, evidence))
        excess = jnp.sum(tokens.present, axis=-1) - counts
        store, carried = self.losers.step(store, carried, scores, excess)
        return store, (counts, recent, carried)

    def rank(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G T"]:
        """The score, or its mean over the layer's heads."""
        scores = self.score.rank(tokens, evidence)
        return (
            jnp.broadcast_to(jnp.mean(scores, axis=1, keepdims=True), scores.shape)
            if self.across == "layer"
            else scores
        )

    def protected(self, tokens: Tokens, evidence: Evidence, recent: Any) -> Bool[Array, "B G T"]:
        """Sinks and the most recent tokens, by true position."""
        start = (evidence.seen - recent)[:, None, None]
        return tokens.present & ((tokens.positions < self.sinks) | (tokens.positions >= start))
