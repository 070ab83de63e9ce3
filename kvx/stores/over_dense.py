"""What stores share that are another way to read, or to choose from, the slots of a dense store."""

from dataclasses import replace
from typing import Any

from jaxtyping import Array, Float, Int, Shaped

from kvx.stores.base import nbytes
from kvx.stores.dense import Dense
from kvx.tokens import Tokens


class OverDense:
    """The verbs that are those of the slots beneath; a subclass reads in its own way.

    Attributes:
        inner: the slots.
    """

    inner: Dense

    def append(self, tokens: Tokens) -> Any:
        return self._over(self.inner.append(tokens))

    def release(self, scores: Float[Array, "B G C"], excess: Int[Array, "B G"], most: int = 1) -> Any:
        return self._over(self.inner.release(scores, excess, most))

    def tokens(self) -> Tokens:
        return self.inner.tokens()

    def positions(self) -> Int[Array, "B G C"]:
        return self.inner.slots

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        return self.inner.dense()

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return self.inner.stats

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> Any:
        return self._over(self.inner.with_stats(stats))

    def bytes_read(self) -> int:
        return nbytes(self)

    def _over(self, inner: Dense) -> Any:
        return replace(self, inner=inner)  # type: ignore[type-var]
