"""Losers: what happens to tokens that do not stay (grid 1, third column)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.context import Context, Spec
from kvx.decoder import AttentionSpec
from kvx.evidence import Evidence, Requests
from kvx.kernels.merge_partials import Partial
from kvx.pytree import pytree
from kvx.query import Query
from kvx.tokens import Tokens


class Losers(Protocol):
    """The fate of the tokens a selection lets go.

    Class attributes:
        recalls: its state holds what became of them (`recall`).
        values_apart: it merges values apart from keys; see `Stage.values_apart`.
        unchained: it writes into the store's slots itself; see `Stage.unchained`.
    """

    recalls: ClassVar[bool] = False
    values_apart: ClassVar[bool] = False
    unchained: bool = False

    def objection(self, layers: Mapping[int, AttentionSpec]) -> str | None:
        """Why it cannot serve a model; see `Stage.objection`."""
        return None

    def check(self, spec: Spec) -> None:
        """Refuse a model it cannot serve (BadInput)."""

    def observe(self, prefill: bool) -> Requests:
        """Evidence it reads, beside the score's."""
        return Requests()

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        """Statistics it keeps with each token; see `Score.stats`."""
        return {}

    def update(self, stats: dict[str, Shaped[Array, "B G C"]], evidence: Evidence) -> dict[str, Shaped[Array, "B G C"]]:
        """Its statistics after a decode step."""
        return {}

    def settle(
        self,
        tokens: Tokens,
        kept: Bool[Array, "B G T"],
        lost: Bool[Array, "B G T"],
        evidence: Evidence,
        context: Context,
    ) -> tuple[Tokens, Any]:
        """After a prompt or chunk: the tokens, changed where survivors took something over, and a state."""
        ...

    def before(self, store: Any, state: Any, context: Context) -> tuple[Any, Any]:
        """Before the next token is appended: what the last step left to be written.

        Written in that step, after the read, XLA would copy the array rather than order the two.
        """
        return store, state

    def step(
        self,
        store: Any,
        state: Any,
        scores: Float[Array, "B G C"],
        excess: Int[Array, "B G"],
        most: int,
        context: Context,
    ) -> tuple[Any, Any]:
        """After a decode step: the store without its `excess` weakest tokens, of which there are at most `most`."""
        ...

    def recall(self, state: Any, query: Query, context: Context) -> Partial | None:
        """For `recalls`: attention over the tokens that left."""
        return None


@pytree
class Drop(Losers):
    """Gone."""

    def settle(
        self,
        tokens: Tokens,
        kept: Bool[Array, "B G T"],
        lost: Bool[Array, "B G T"],
        evidence: Evidence,
        context: Context,
    ) -> tuple[Tokens, Any]:
        return tokens, None

    def step(
        self,
        store: Any,
        state: Any,
        scores: Float[Array, "B G C"],
        excess: Int[Array, "B G"],
        most: int,
        context: Context,
    ) -> tuple[Any, Any]:
        return store.release(scores, excess, most), state
