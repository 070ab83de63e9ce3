"""The query's side of a converted layer: one matrix as it was, or a query latent by SVD of the weights."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from kvx.errors import BadInput
from kvx.train.convert.assemble import Queries
from kvx.train.convert.factorisation import Decomposition, Metric, joint
from kvx.train.convert.moments import Moments, about_mean
from kvx.train.convert.ranks import Ranks


@runtime_checkable
class QueryRule(Protocol):
    """A rule that makes the query matrices of all converted layers."""

    def known(self, most: int) -> int | None:
        """Channels of the query latent, whatever the weights; None: there is none, or they tell. Raises BadInput for
        more than `most`."""
        ...

    @property
    def reads_text(self) -> bool:
        """Whether it needs moments."""
        ...

    def __call__(self, rows: list[Float[np.ndarray, "H K X"]], moments: list[Moments | None]) -> list[Queries]:
        """One for each layer, from what its heads compute of the input."""
        ...


@dataclass(frozen=True)
class Direct:
    """No query latent: one matrix."""

    reads_text = False

    def known(self, most: int) -> None:
        """None."""

    def __call__(self, rows: list[Float[np.ndarray, "H K X"]], moments: list[Moments | None]) -> list[Queries]:
        """The rows as they are."""
        return [Queries(None, each[..., :-1], each[..., -1]) for each in rows]


@dataclass(frozen=True)
class QueryLatent:
    """q ~ up (down x) by SVD of all heads' rows (X-EcoMLA), or by principal components of the queries (TransMLA).

    Attributes:
        ranks: of the query latents.
        by_activations: weigh errors by the inputs' second moments.
    """

    ranks: Ranks
    by_activations: bool = False

    def known(self, most: int) -> int | None:
        """As its ranks are."""
        return self.ranks.known(most)

    @property
    def reads_text(self) -> bool:
        """Whether it needs moments."""
        return self.by_activations

    def __call__(self, rows: list[Float[np.ndarray, "H K X"]], moments: list[Moments | None]) -> list[Queries]:
        """Raises BadInput for ranks that the layers do not have."""
        found = [self._decomposed(*each) for each in zip(rows, moments, strict=True)]
        ranks = self.ranks([each.spectrum for each in found])
        return [self._queries(*each) for each in zip(rows, found, ranks, strict=True)]

    def _decomposed(self, rows: Float[np.ndarray, "H K X"], moments: Moments | None) -> Decomposition:
        flat = rows.reshape(-1, rows.shape[-1])
        only_bias = np.zeros(flat.shape[1])
        only_bias[-1] = 1
        if not self.by_activations:
            return joint(flat, flat[:0], Metric(centre=only_bias))
        if moments is None:
            raise BadInput("moments=None, but a query latent by activations needs them")
        return joint(flat, flat[:0], Metric(inputs=about_mean(moments.inputs), centre=moments.inputs[:, -1]))

    def _queries(self, rows: Float[np.ndarray, "H K X"], found: Decomposition, rank: int) -> Queries:
        factors = found.at(rank)
        shape = rows.shape[:2]
        return Queries(factors.down[:, :-1], factors.key_up.reshape(*shape, -1), factors.key_offset.reshape(shape))
