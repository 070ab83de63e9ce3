"""The stage that profiles every head on the prompt and gives it the cheapest rule that recovers its attention."""

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, Shaped

from kvx.context import Context
from kvx.evidence import Evidence, Requests
from kvx.kernels.prefill_attention.columns import SUM, Column, near_width
from kvx.kinds import ORDINARY, SPECIAL, kinds_of
from kvx.parts.ranking import top
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.flat import Flat
from kvx.tokens import Tokens

KIND, RECEIVED = "kind", "received"

SPECIALS, PUNCTUATED, FREQUENT, LOCAL, EVERYTHING = range(5)
"""The rules in order of cost; each keeps what the one before it keeps."""

UNLIMITED = 2**29


@pytree
class Rules:
    """What a layer's heads keep while decoding; data, by row and KV head.

    Attributes:
        rule: the rule, 0 to 4.
        ordinary: tokens of no kept kind that are held at most.
        kinds: tokens of a kept kind that are held at most.
        recent: newest tokens that are protected.
        prompt: tokens of each row's prompt.
    """

    rule: Int8[Array, "B G"]
    ordinary: Int[Array, "B G"]
    kinds: Int[Array, "B G"]
    recent: Int[Array, "B G"]
    prompt: Int[Array, "B"]


@pytree
class Profile(Stage):
    """Nested rules, from special tokens alone to everything; a head gets the first that recovers enough (FastGen).

    With the mean attention p over a KV head's query heads, S the prompt's length, columns C of a rule and a band of
    `local` S tokens before each query for the last but one:

        R = (sum_{j in C} sum_i p_ij + [band] sum_{j not in C} sum_{i - j < local S} p_ij) / S >= recovery

    Original mass is summed. Truncated and renormalised, a row of kept mass m differs from itself by 2 (1 - m) in L1,
    so that the paper's distance, halved, is the same test.

    Everything here is data: rules, hence counts, hence what a layer holds in all (`need`). Its heads share one run of
    slots; a slot that one frees serves any other. What comes needs room: a head that keeps everything has it for every
    token; others have one slot for the token that is seen in its own step, and slots for a `reserve` of tokens of kinds
    that they keep, beyond which the oldest generated one of them goes.

    A layer's run is as large as its own rules need, in eighths of the worst case. Shapes then follow the prompt: one
    whose layers need other eighths than those before it compiles its decode step anew.

    Attributes:
        recovery: share of the attention that a rule must recover.
        frequent: share of the prompt's length that are heavy hitters, by mean attention, outside the kept kinds.
        local: share of the prompt's length that is the recent window.
        sinks: first tokens that count as special whatever their ids.
        shortest: prompts shorter than this say too little; all their heads keep everything.
        reserve: share of the generated tokens that may be of a kept kind.
        table: the kind of every token id; None: nothing is known of ids.
    """

    recovery: float = static()
    frequent: float = static()
    local: float = static()
    sinks: int = static(1)
    shortest: int = static(64)
    reserve: float = static(0.25)
    table: Int8[Array, "N"] | None = None
    stores = True
    measures = True
    evicts = True  # type: ignore[assignment]
    by_kind = True

    def with_kinds(self, table: Int8[Array, "N"]) -> "Profile":
        return replace(self, table=table)

    def observe(self, prefill: bool) -> Requests:
        marks = frozenset() if self.table is None else frozenset({"id"})
        if prefill:
            return Requests(columns=frozenset({SUM, self._band}), marks=marks)
        return Requests(rows=1, marks=marks)

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        kinds = jnp.full(tokens.positions.shape, ORDINARY, jnp.int8)
        if self.table is not None:
            kinds = kinds_of(self.table, tokens.stats["id"])
        received = jnp.zeros(tokens.positions.shape, jnp.float32)
        if evidence is not None:
            received = jnp.mean(evidence.columns[SUM], axis=2)
        return {KIND: jnp.where(tokens.positions < self.sinks, jnp.int8(SPECIAL), kinds), RECEIVED: received}

    def keep(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], Rules]:
        frequent, local = (near_width(context.lengths, share)[:, None] for share in (self.frequent, self.local))
        nested = self._nested(tokens, mask, evidence, frequent)
        rule = self._rule(nested, tokens, mask, evidence, context.lengths)
        recent = mask & (tokens.positions >= evidence.seen[:, None, None] - local[..., None])
        choices = jnp.stack([*nested, nested[-1] | recent, mask])
        kept = jnp.take_along_axis(choices, rule[None, ..., None].astype(jnp.int32), axis=0)[0]
        held = jnp.where(rule == SPECIALS, jnp.sum(nested[SPECIALS], axis=-1), jnp.sum(nested[PUNCTUATED], axis=-1))
        reserve = 0 if self.table is None else math.ceil(self.reserve * context.spec.room)
        ordinary = _by_rule(rule, 0, 0, frequent, frequent + local, UNLIMITED)
        newest = _by_rule(rule, 0, 0, jnp.minimum(frequent, 1), jnp.maximum(local, jnp.minimum(frequent, 1)), 0)
        kinds = jnp.where(rule == EVERYTHING, UNLIMITED, held + reserve)
        return tokens, kept, Rules(rule, ordinary, kinds, newest, context.lengths)

    def need(self, tokens: Tokens, mask: Bool[Array, "B G T"], state: Rules, context: Context) -> Int[Array, ""]:
        """Slots per head, averaged over a layer's heads; no head ever holds more than its prompt and what comes."""
        heads = jnp.minimum(state.ordinary + state.kinds + 1, (context.lengths + context.spec.room)[:, None])
        return jnp.max(-(-jnp.sum(heads, axis=-1) // heads.shape[-1]))

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Flat:
        return Flat.pack(tokens, mask, capacity * mask.shape[1])

    def step(self, store: Flat, state: Rules, evidence: Evidence, context: Context) -> tuple[Any, Any]:
        stats = store.stats
        received = stats[RECEIVED] + jnp.mean(evidence.last_rows(1)[..., 0, :], axis=2)
        store = store.with_stats({**stats, RECEIVED: received})
        positions, kinds = store.positions(), stats[KIND]
        age = evidence.seen[:, None, None] - positions
        kept_kind = jnp.where((state.rule == SPECIALS)[..., None], kinds == SPECIAL, kinds != ORDINARY)
        ordinary, kept_kind = ((positions >= 0) & which for which in (~kept_kind, kept_kind))
        excess = jnp.sum(ordinary, axis=-1) - state.ordinary
        beyond = jnp.sum(kept_kind, axis=-1) - state.kinds
        leaving = ordinary & (age > state.recent[..., None])
        mean = jnp.where(leaving, received / jnp.maximum(age, 1), jnp.inf)
        generated = kept_kind & (positions >= state.prompt[:, None, None])
        oldest = jnp.where(generated, -age.astype(jnp.float32), jnp.inf)
        # One token came, so at most one of the two is over.
        scores = jnp.where((excess > 0)[..., None], mean, oldest)
        return store.release(scores, jnp.maximum(excess, beyond)), state

    @property
    def _band(self) -> Column:
        return Column(near=self.local)

    def _nested(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, frequent: Int[Array, "B 1"]
    ) -> tuple[Bool[Array, "B G T"], ...]:
        """The columns of the rules below the band: special; and punctuation; and heavy hitters."""
        special = mask & (tokens.stats[KIND] == SPECIAL)
        marked = mask & (tokens.stats[KIND] != ORDINARY)
        # Mean over the queries that could see it, else the first tokens win by age alone.
        mean = tokens.stats[RECEIVED] / jnp.maximum(evidence.seen[:, None, None] - tokens.positions, 1)
        # Heavy hitters come from the others, so that each rule holds what the one before it holds.
        hitters = top(mean, mask & ~marked, jnp.broadcast_to(frequent, mask.shape[:2]))
        return special, marked, marked | hitters

    def _rule(
        self,
        nested: tuple[Bool[Array, "B G T"], ...],
        tokens: Tokens,
        mask: Bool[Array, "B G T"],
        evidence: Evidence,
        lengths: Int[Array, "B"],
    ) -> Int8[Array, "B G"]:
        """The first rule that recovers enough."""
        enough = self.recoveries(nested, tokens, mask, evidence, lengths) >= self.recovery
        rule = jnp.where(jnp.any(enough, axis=0), jnp.argmax(enough, axis=0), EVERYTHING)
        return jnp.where((lengths < self.shortest)[:, None], EVERYTHING, rule).astype(jnp.int8)

    def recoveries(
        self,
        nested: tuple[Bool[Array, "B G T"], ...],
        tokens: Tokens,
        mask: Bool[Array, "B G T"],
        evidence: Evidence,
        lengths: Int[Array, "B"],
    ) -> Float[Array, "4 B G"]:
        """Share of each head's attention within the columns of each rule, and within the last ones and the band."""
        received = tokens.stats[RECEIVED]
        near = jnp.where(mask, jnp.mean(evidence.columns[self._band], axis=2), 0.0)
        within = [jnp.where(columns, received, 0.0) for columns in nested]
        within.append(jnp.where(nested[-1], received, near))
        return jnp.sum(jnp.stack(within), axis=-1) / lengths[:, None]


def _by_rule(rule: Int8[Array, "B G"], *values: Int[Array, "B 1"] | int) -> Int[Array, "B G"]:
    """One value for each rule, by the head's."""
    table = jnp.stack(jnp.broadcast_arrays(*(jnp.asarray(value, jnp.int32) for value in values), rule)[:-1])
    return jnp.take_along_axis(table, rule[None].astype(jnp.int32), axis=0)[0]
