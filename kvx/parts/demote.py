"""The stage that evicts nothing for good: what another stage would drop goes to a second tier (grid 1, losers)."""

from dataclasses import replace
from typing import Any, ClassVar, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.buckets import round_up
from kvx.context import Activations, Context, Spec
from kvx.evidence import Evidence, Requests
from kvx.parts.balance import balance
from kvx.parts.evict import Evict
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.stores.coded import Code, Coded
from kvx.stores.dense import Dense
from kvx.stores.tiers import Tiers
from kvx.tokens import Tokens

HIGH = "high"
"""The statistic that carries the choice of tier from `keep` to `pack`."""


class Lower(Protocol):
    """How the second tier holds tokens; its store's `append` takes what leaves the first.

    Class attributes:
        constant: the tier never grows, so that the whole cache is bounded if the first tier is.
        values_apart: it codes values apart from keys; see `Stage.values_apart`.
    """

    constant: ClassVar[bool] = False
    values_apart: ClassVar[bool] = False

    def observe(self, prefill: bool) -> Requests:
        """Evidence that `pack` reads."""
        return Requests()

    def check(self, spec: Spec) -> None:
        """Refuse a model it cannot serve (BadInput)."""

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Any:
        """The tier after a prompt: the rotated tokens in `mask`, and room for `capacity` in all.

        A store that need not `release`.
        """
        ...


@pytree
class LowBits(Lower):
    """Every token in a few bits (MiKV).

    Attributes:
        code: how keys and values are written.
        balanced: balance key channels against the prompt's queries before coding.
    """

    code: Code = static()
    balanced: bool = static(True)
    values_apart: ClassVar[bool] = True

    def observe(self, prefill: bool) -> Requests:
        return Requests(query=prefill and self.balanced)

    def check(self, spec: Spec) -> None:
        self.code.check(spec.attention.key_dim, "keys")
        self.code.check(spec.attention.value_dim, "values")

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Coded:
        factors = self._factors(tokens, evidence) if self.balanced else None
        return Coded.pack(tokens, mask, capacity, code=self.code, balance=factors)

    def _factors(self, tokens: Tokens, evidence: Evidence) -> Float[Array, "B G D"]:
        """The balance by the whole prompt, frozen here."""
        assert evidence.query_peak is not None, "observe() asked for it"
        sizes = jnp.abs(tokens.keys.astype(jnp.float32))
        return balance(evidence.query_peak, jnp.max(jnp.where(tokens.present[..., None], sizes, 0.0), axis=2))


@pytree
class Demote(Stage):
    """Two tiers a head: the tokens that `host` keeps as they are, the others as `lower` holds them.

    An eviction stage serves as it is: it chooses and evicts on the first tier alone, and what leaves there arrives in
    the second. Nothing is ever promoted, since what a token was is gone; so nobody tracks scores in the second tier.

    Attributes:
        host: the selection; its budget is the first tier's.
        lower: the second tier.
    """

    host: Evict
    lower: Any
    stores = True
    append_only = True

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return self.host.bounded and self.lower.constant

    @property
    def evicts(self) -> bool:
        return self.host.evicts and self.lower.constant

    @property
    def values_apart(self) -> bool:  # type: ignore[override]
        return self.host.values_apart or self.lower.values_apart

    @property
    def recalls(self) -> bool:  # type: ignore[override]
        # A tier of constant size holds no single tokens, so none can come back into the next chunk's attention.
        return self.lower.constant

    @property
    def overflow(self) -> int:  # type: ignore[override]
        return 2

    def at(self, layer: int, layers: int) -> "Demote | None":
        host = self.host.at(layer, layers)
        return None if host is None else replace(self, host=host)

    @property
    def decides(self) -> str:  # type: ignore[override]
        return self.host.decides

    def measure(self, tokens: Tokens, evidence: Evidence) -> Any:
        return self.host.measure(tokens, evidence)

    def plan(self, measures: list[Any], spec: Spec, lengths: Int[Array, "B"], ends: Int[Array, "B"]) -> list[Any]:
        return self.host.plan(measures, spec, lengths, ends)

    def observe(self, prefill: bool) -> Requests:
        return self.host.observe(prefill) | self.lower.observe(prefill)

    @property
    def learns(self) -> bool:  # type: ignore[override]
        return self.host.learns

    def digest(self, activations: Activations) -> Any:
        return self.host.digest(activations)

    def calibrate(self, digests: list[Any]) -> "Demote":
        return replace(self, host=self.host.calibrate(digests))

    def capacity(self, spec: Spec, layer: int) -> int | None:
        self.lower.check(spec)
        limit = self.host.capacity(spec, layer)
        return limit if self.lower.constant else None

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        unknown = jnp.zeros(tokens.positions.shape, jnp.float32)
        return {**self.host.stats(tokens, evidence, context), HIGH: unknown}

    def keep(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], Any]:
        tokens, kept, state = self.host.keep(tokens, mask, evidence, context)
        return replace(tokens, stats={**tokens.stats, HIGH: kept.astype(jnp.float32)}), mask, state

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Tiers:
        tokens = tokens.with_form(rotated=True)
        stats = dict(tokens.stats)
        high = stats.pop(HIGH) > 0
        first = Dense.pack(replace(tokens, stats=stats), mask & high, min(self._slots(context.spec), capacity))
        rest = replace(tokens, stats={})
        return Tiers.moving(first, self.lower.pack(rest, mask & ~high, capacity, evidence, context))

    def step(self, store: Tiers, state: Any, evidence: Evidence, context: Context) -> tuple[Any, Any]:
        first = store.tiers[0]
        if evidence.rows is not None:
            evidence = replace(evidence, rows=evidence.rows[..., : store.sizes[0]])
        first, state = self.host.step(first, state, evidence, context)
        return store.demote(first), state

    def _slots(self, spec: Spec) -> int:
        """Slots of the first tier: two beyond the host's budget, for the new token and the one that then moves.

        The most over all layers, since one compiled body serves equal layers.
        """
        most = max(self.host.capacity(spec, layer) for layer in range(spec.layers))
        return round_up(most + 2 if self.host.evicts else most + spec.room)
