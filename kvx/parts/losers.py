"""Losers: what happens to tokens that do not stay (grid 1, third column)."""

from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, Int

from kvx.evidence import Evidence
from kvx.pytree import pytree
from kvx.tokens import Tokens


class Losers(Protocol):
    """The fate of the tokens a selection lets go."""

    def settle(
        self, tokens: Tokens, kept: Bool[Array, "B G T"], lost: Bool[Array, "B G T"], evidence: Evidence
    ) -> tuple[Tokens, Any]:
        """After a prompt or chunk: the tokens, changed where survivors took something over, and a state."""
        ...

    def step(self, store: Any, state: Any, scores: Float[Array, "B G C"], excess: Int[Array, "B G"]) -> tuple[Any, Any]:
        """After a decode step: the store without its weakest unit wherever a head holds too much."""
        ...


@pytree
class Drop(Losers):
    """Gone."""

    def settle(
        self, tokens: Tokens, kept: Bool[Array, "B G T"], lost: Bool[Array, "B G T"], evidence: Evidence
    ) -> tuple[Tokens, Any]:
        return tokens, None

    def step(self, store: Any, state: Any, scores: Float[Array, "B G C"], excess: Int[Array, "B G"]) -> tuple[Any, Any]:
        return store.release(scores, excess), state
