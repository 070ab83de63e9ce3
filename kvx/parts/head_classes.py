"""The stage of unlike heads: every KV head follows one of a few rules, by a map that is known beforehand."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from kvx.context import Activations, Context, Spec
from kvx.decoder import AttentionSpec
from kvx.errors import BadInput
from kvx.evidence import Evidence, Requests
from kvx.policy import Layer, Policy
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stage import Stage
from kvx.stores.by_head import ByHead, HeadSplit
from kvx.tokens import Tokens

Heads = tuple[tuple[int, int], ...]
"""(layer, KV head) pairs."""


@runtime_checkable
class Search(Protocol):
    """How calibration finds which heads follow the first rule."""

    def probe(self, vocabulary: int, longest: int, seed: int) -> Int[np.ndarray, "T"] | None:
        """As `Stage.probe`."""
        ...

    def digest(self, activations: Activations) -> Any:
        """As `Stage.digest`."""
        ...

    def choose(self, digests: list[Any]) -> Heads:
        """The heads, from every layer's digest."""
        ...


@pytree
class HeadClasses(Stage):
    """Every rule selects, packs and steps on its own heads, as if the layer had no others.

    How many heads of a layer follow a rule is static, which ones is data: layers with equal counts share their compiled
    programs. A rule that no head of a layer follows does not exist there.

    Attributes:
        rules: policies that decide layer by layer and learn nothing; the last is for every head that is not named.
        heads: those that follow each rule but the last; None until calibrated.
        search: finds the heads of the first rule; None once they are known.
        here: in one layer (`at`): the KV heads of each rule but the last.
    """

    rules: tuple[Policy, ...]
    heads: tuple[Heads, ...] | None = static(None)
    search: Search | None = None
    here: tuple[Int[Array | np.ndarray, "_"], ...] | None = None
    stores = True
    append_only = True

    @classmethod
    def of(
        cls, rules: tuple[Policy, ...], heads: tuple[Heads, ...] | None, search: Search | None = None
    ) -> "HeadClasses":
        """With its rules checked.

        Raises:
            BadInput: a rule that needs more than one layer's own heads.
        """
        for rule in rules:
            shared = rule.decides != "layer" or rule.alone or rule.measures or rule.renumber
            if shared or any(_reaches_beyond(stage) for stage in rule.stages):
                raise BadInput(
                    f"rule {rule.text!r} cannot serve some heads of a layer; allowed: policies that decide layer by "
                    "layer at true positions, learn nothing, and read no more than their store"
                )
        return cls(rules, heads, search)

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return all(rule.bounded for rule in self._followed)

    @property
    def overflow(self) -> int:  # type: ignore[override]
        return max(stage.overflow for rule in self.rules for stage in rule.stages)

    @property
    def rotated(self) -> bool:  # type: ignore[override]
        return all(rule.rotated for rule in self.rules)

    def objection(self, layers: Mapping[int, AttentionSpec]) -> str | None:
        reasons = (stage.objection(layers) for rule in self.rules for stage in rule.stages)
        return next((reason for reason in reasons if reason), None)

    @property
    def recalls(self) -> bool:  # type: ignore[override]
        return any(stage.recalls for rule in self.rules for stage in rule.stages)

    @property
    def learns(self) -> bool:  # type: ignore[override]
        return self.search is not None

    def probe(self, vocabulary: int, longest: int, seed: int) -> Int[np.ndarray, "T"] | None:
        assert self.search is not None, "asked only if it learns"
        return self.search.probe(vocabulary, longest, seed)

    def digest(self, activations: Activations) -> Any:
        assert self.search is not None, "asked only if it learns"
        return self.search.digest(activations)

    def calibrate(self, digests: list[Any]) -> "HeadClasses":
        assert self.search is not None, "asked only if it learns"
        return replace(self, heads=(self.search.choose(digests),), search=None)

    @property
    def learned(self) -> dict[str, Any]:
        return {} if self.heads is None else {"heads": self.heads[0]}

    def at(self, layer: int, layers: int) -> "HeadClasses":
        named = self.heads or ()
        here = [sorted(head for index, head in heads if index == layer) for heads in named]
        rules = tuple(rule.at(layer, layers) for rule in self.rules)
        return replace(self, rules=rules, here=tuple(np.asarray(heads, np.int32) for heads in here))

    def observe(self, prefill: bool) -> Requests:
        wanted = Requests()
        for rule in self.rules:
            wanted |= rule.observe(prefill)
        return wanted

    def capacity(self, spec: Spec, layer: int) -> int | None:
        self._check(spec, layer)
        limits = []
        for rule in self._followed:
            rule.slots(spec, layer)  # refuses what the model cannot serve
            own = [stage.capacity(spec, layer) for stage in rule.stages]
            limits.append(min((limit for limit in own if limit is not None), default=None))
        return None if None in limits else max(limits)

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        split, contexts = self._split(context), self._contexts(context)
        parts = [
            rule.stats(tokens.heads(heads), None if evidence is None else evidence.heads(heads), where)
            for rule, heads, where in zip(self._present(context), split.members, contexts, strict=True)
        ]
        return dict(split.join_tokens(parts).stats)

    def keep(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], Any]:
        split, contexts = self._split(context), self._contexts(context)
        parts = [
            rule.keep(tokens.heads(heads), mask[:, heads], evidence.heads(heads), where)
            for rule, heads, where in zip(self._present(context), split.members, contexts, strict=True)
        ]
        kept, masks, states = zip(*parts, strict=True)
        return split.join_tokens(kept), split.join(masks), states

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> ByHead:
        split, contexts = self._split(context), self._contexts(context)
        stores = []
        for rule, heads, where in zip(self._present(context), split.members, contexts, strict=True):
            # The most over all layers, since one compiled body serves equal layers.
            slots = min(capacity, max(rule.slots(where.spec, layer) for layer in range(where.spec.layers)))
            stores.append(rule.pack(tokens.heads(heads), mask[:, heads], evidence.heads(heads), where, slots))
        return ByHead(tuple(stores), split)

    def before(self, store: ByHead, state: Any, query: Query, context: Context) -> tuple[Any, Any]:
        return self._each(
            store, state, context, lambda rule, layer, part, where: rule.before(layer, query.heads(part), where)
        )

    def step(self, store: ByHead, state: Any, evidence: Evidence, context: Context) -> tuple[Any, Any]:
        def one(rule: Policy, layer: Layer, heads: Int[Array, "_"], where: Context) -> Layer:
            seen = evidence.heads(heads)
            if seen.rows is not None:
                seen = replace(seen, rows=seen.rows[..., : layer.store.positions().shape[-1]])
            return rule.step(layer, seen, where)

        return self._each(store, state, context, one)

    def _each(self, store: ByHead, state: Any, context: Context, act: Callable) -> tuple[Any, Any]:
        """The store and states after every rule has acted on its own."""
        each = zip(
            self._present(context), store.stores, state, store.split.members, self._contexts(context), strict=True
        )
        layers = [act(rule, Layer(part, states), heads, where) for rule, part, states, heads, where in each]
        return replace(store, stores=tuple(layer.store for layer in layers)), tuple(layer.states for layer in layers)

    @property
    def _followed(self) -> list[Policy]:
        """The rules that any head may follow: in this layer, or in any if this is not one layer's."""
        named = self.here if self.here is not None else self.heads or ()
        return [rule for rule, heads in zip(self.rules, named, strict=False) if len(heads)] + [self.rules[-1]]

    def _counts(self, kv_heads: int) -> list[int]:
        """Heads that follow each rule here."""
        assert self.here is not None, "asked in one layer"
        named = [len(heads) for heads in self.here]
        return [*named, kv_heads - sum(named)]

    def _present(self, context: Context) -> list[Policy]:
        """The rules that any head follows here."""
        counts = self._counts(context.spec.attention.kv_heads)
        return [rule for rule, count in zip(self.rules, counts, strict=True) if count]

    def _split(self, context: Context) -> HeadSplit:
        """The heads of each rule that any follows here."""
        kv_heads = context.spec.attention.kv_heads
        assert self.here is not None, "asked in one layer"
        named = jnp.concatenate([jnp.zeros(0, jnp.int32), *self.here])
        others = jnp.ones(kv_heads, bool).at[named].set(False)
        (rest,) = jnp.nonzero(others, size=self._counts(kv_heads)[-1])
        return HeadSplit(tuple(jnp.asarray(heads, jnp.int32) for heads in (*self.here, rest) if len(heads)))

    def _contexts(self, context: Context) -> list[Context]:
        """What each rule that any head follows is told: a layer of so many heads."""
        spec = context.spec
        counts = [count for count in self._counts(spec.attention.kv_heads) if count]
        return [
            replace(context, spec=replace(spec, attention=spec.attention.only(count)), plan=None) for count in counts
        ]

    def _check(self, spec: Spec, layer: int) -> None:
        if self.heads is None:
            raise BadInput(
                "policy is not calibrated: its heads are None; allowed: kvx.calibrate(policy, model) first, "
                "kvx.load_policy(path), or heads=((layer, KV head), ...)"
            )
        kv_heads = spec.attention.kv_heads
        for index, head in (pair for heads in self.heads for pair in heads):
            if index >= spec.layers or (index == layer and head >= kv_heads):
                raise BadInput(
                    f"heads names ({index}, {head}), which the model does not have; allowed: layers 0 to "
                    f"{spec.layers - 1}, KV heads 0 to {kv_heads - 1}"
                )


def _reaches_beyond(stage: Stage) -> bool:
    """Whether a stage learns by layer and head, or needs more than a store of some heads and the hooks passed on."""
    own = any(getattr(type(stage), hook) is not getattr(Stage, hook) for hook in ("read", "settle"))
    return own or stage.learns or stage.aligned or stage.unchained or (stage.recalls and not stage.stores)
