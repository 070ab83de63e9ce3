"""The tiered store: several stores that attention reads as one, and the one-way road from the first to the second."""

from dataclasses import replace
from functools import reduce
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.pytree import pytree
from kvx.query import Query
from kvx.stores.base import Store
from kvx.stores.slots import weakest
from kvx.tokens import Tokens, concatenate


@pytree
class Tiers:
    """Disjoint sets of tokens under one softmax, merged by log-sum-exp. Slots are numbered tier after tier.

    New tokens arrive in the first tier. A token may be marked to move to the second, at most one a head; it moves with
    the next token that arrives, so that every write comes before the step's reads. (Moved at once, it would be written
    after its tier had been read, and XLA copies an array rather than order the two.) Likewise the new token is written
    before the moving one is taken out, so the first tier needs two spare slots.

    A statistic that a tier does not keep shows as zero there and is not written.

    Bytes: the sum of its tiers', and 4 a KV head if tokens move.

    Attributes:
        tiers: any stores; for tokens to move, the first must let single ones go (`take`, `evict`).
        leaving: slot of the first tier whose token moves next, -1 for none; None: nothing ever moves.
    """

    tiers: tuple[Any, ...]
    leaving: Int[Array, "B G"] | None = None

    @classmethod
    def moving(cls, first: Store, second: Any) -> "Tiers":
        """Two tiers between which tokens will move; the second only takes, so it need not offer `release`."""
        return cls((first, second), jnp.full(first.positions().shape[:2], -1, jnp.int32))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Slots of each tier."""
        return tuple(tier.positions().shape[-1] for tier in self.tiers)

    def append(self, tokens: Tokens) -> "Tiers":
        first, *rest = self.tiers
        first = first.append(tokens)
        if self.leaving is None:
            return replace(self, tiers=(first, *rest))
        # A row that has ended appends nothing and moves nothing.
        when = (self.leaving >= 0) & tokens.present[..., 0]
        slot = jnp.maximum(self.leaving, 0)
        rest[0] = rest[0].append(first.take(slot, when))
        return Tiers((first.evict(slot, when), *rest), jnp.where(when, -1, self.leaving))

    def read(self, query: Query) -> Partial:
        return merge_partials(*(tier.read(query) for tier in self.tiers))

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        return jnp.concatenate([tier.probabilities(query, lse) for tier in self.tiers], axis=-1)

    def release(self, scores: Float[Array, "B G C"], excess: Int[Array, "B G"], most: int = 1) -> "Tiers":
        assert most == 1, "tiers let one token go at a time"
        place = weakest(scores, self.positions())
        tiers, start = [], 0
        for tier, size in zip(self.tiers, self.sizes, strict=True):
            here = (place >= start) & (place < start + size)
            tiers.append(tier.release(scores[..., start : start + size], jnp.where(here, excess, 0)))
            start += size
        if self.leaving is None:
            return replace(self, tiers=tuple(tiers))
        gone = (place == self.leaving) & (excess > 0)
        return Tiers(tuple(tiers), jnp.where(gone, -1, self.leaving))

    def demote(self, first: Store) -> "Tiers":
        """What an eviction took from the first tier moves to the second instead.

        Args:
            first: the first tier after the eviction of at most one token a head; its statistics are taken over.
        """
        assert self.leaving is not None, "made by `moving`"
        before = self.tiers[0]
        gone = (before.positions() >= 0) & (first.positions() < 0)
        slot = jnp.where(jnp.any(gone, axis=-1), jnp.argmax(gone, axis=-1), -1).astype(jnp.int32)
        # A row that has ended keeps the choice it made.
        leaving = jnp.where(self.leaving >= 0, self.leaving, slot)
        return Tiers((before.with_stats(first.stats), *self.tiers[1:]), leaving)

    def tokens(self) -> Tokens:
        return reduce(concatenate, (tier.tokens() for tier in self.tiers))

    def positions(self) -> Int[Array, "B G C"]:
        return jnp.concatenate([tier.positions() for tier in self.tiers], axis=-1)

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.rotated_keys, tokens.attended_values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return dict(self.tokens().stats)

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "Tiers":
        tiers, start = [], 0
        for tier, size in zip(self.tiers, self.sizes, strict=True):
            tiers.append(tier.with_stats({name: stats[name][..., start : start + size] for name in tier.stats}))
            start += size
        return replace(self, tiers=tuple(tiers))

    def bytes_read(self) -> int | Float[Array, ""]:
        return sum(tier.bytes_read() for tier in self.tiers)
