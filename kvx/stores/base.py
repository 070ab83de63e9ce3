"""The store protocol: how one layer's keys and values are kept, as an immutable pytree.

Every store reads as a partial softmax, so stores combine (`kvx.stores.tiers`); a slot is empty when its position is
-1, and appending a token at position -1 (a row that has ended) leaves what the store stands for unchanged.
"""

from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, Shaped

from kvx.kernels.merge_partials import Partial
from kvx.query import Query
from kvx.tokens import Tokens


@runtime_checkable
class Store(Protocol):
    """What the layer loop, policies and reports ask of a store. Slots are numbered as `dense()` shows them."""

    def append(self, tokens: Tokens) -> "Store":
        """With one more token per KV head, written to a slot that is empty; positions of -1 write nothing.

        Stores that verify drafts (`kvx.speculate`) take several.
        """
        ...

    def read(self, query: Query) -> Partial:
        """Partial attention of the queries over every token held: out (B, G, R, T, V), lse (B, G, R, T)."""
        ...

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        """Probability of every slot under `lse`, which may span other stores too; 0 where empty."""
        ...

    def release(self, scores: Float[Array, "B G C"], excess: Int[Array, "B G"], most: int = 1) -> "Store":
        """Free the weakest units of eviction of every head that is over its budget by at least a unit.

        Args:
            scores: higher = keep; +inf protects a slot. Empty slots are never chosen.
            excess: tokens held beyond the budget. Most stores evict single slots (the lowest scores, ties: the higher
                position goes); a store of packed groups frees at most one whole group a call.
            most: static bound on the slots that leave.
        """
        ...

    def tokens(self) -> Tokens:
        """What the store stands for, as tokens in slot order with their statistics."""
        ...

    def positions(self) -> Int[Array, "B G C"]:
        """True positions by slot, -1 where empty."""
        ...

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        """Keys, values (as attention sees them, reconstructed) and positions."""
        ...

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        """Statistics by slot."""
        ...

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "Store":
        """The same store with these statistics."""
        ...

    def bytes_read(self) -> int | Float[Array, ""]:
        """Bytes of this store that one decode step touches."""
        ...


def nbytes(tree: object) -> int:
    """Resident bytes of a pytree: the sum of its arrays' `nbytes`, everything included."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
