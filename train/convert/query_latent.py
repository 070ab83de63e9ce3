"""The query's side of a converted layer: one matrix as it was, or a latent from which the source's queries follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from kvx.train.convert.assemble import Queries, query_rows
from kvx.train.convert.factorisation import Decomposition, Metric, joint
from kvx.train.convert.moments import Moments
from kvx.train.convert.ranks import Ranks
from kvx.train.convert.rotary_split import RotarySplit, needed
from kvx.train.convert.source import Source


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

    def __call__(
        self,
        sources: Sequence[Source],
        splits: Sequence[RotarySplit],
        moments: Sequence[Moments | None],
        layers: Sequence[int],
        count: int,
    ) -> list[Queries]:
        """One for each converted layer; `layers` and `count` as in `Ranks`."""
        ...


@dataclass(frozen=True)
class Direct:
    """No query latent: one matrix."""

    reads_text = False

    def known(self, most: int) -> None:
        """None."""

    def __call__(
        self,
        sources: Sequence[Source],
        splits: Sequence[RotarySplit],
        moments: Sequence[Moments | None],
        layers: Sequence[int],
        count: int,
    ) -> list[Queries]:
        """The split's rows as they are."""
        return [Queries(None, rows[..., :-1], rows[..., -1]) for rows in map(query_rows, splits)]


@dataclass(frozen=True)
class QueryLatent:
    """q ~ up (down x) by SVD of the source's query matrix, all heads (X-EcoMLA), or by principal components of what it
    puts out, not centred, biases included (TransMLA, step E). The split's channels, each a linear map of its head's
    query, are taken of `up`, so they spend no rank of their own.

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

    def __call__(
        self,
        sources: Sequence[Source],
        splits: Sequence[RotarySplit],
        moments: Sequence[Moments | None],
        layers: Sequence[int],
        count: int,
    ) -> list[Queries]:
        """Raises BadInput for ranks that the layers do not have, or no moments where they are needed."""
        found = [self._decomposed(*each) for each in zip(sources, moments, strict=True)]
        ranks = self.ranks([each.spectrum for each in found], layers, count)
        return [_queries(*each) for each in zip(sources, splits, found, ranks, strict=True)]

    def _decomposed(self, source: Source, moments: Moments | None) -> Decomposition:
        flat = source.query.reshape(-1, source.query.shape[-1])
        if self.by_activations:
            inputs = needed(moments, "a query latent by activations").inputs
            return joint(flat, flat[:0], Metric(inputs=inputs))
        only_bias = np.zeros(flat.shape[1])
        only_bias[-1] = 1
        return joint(flat, flat[:0], Metric(centre=only_bias))


def _queries(source: Source, split: RotarySplit, found: Decomposition, rank: int) -> Queries:
    factors = found.at(rank)
    # The split's rows lie in the span of their head's, so this is exact.
    channels = query_rows(split) @ np.linalg.pinv(source.query)
    up = factors.key_up.reshape(*source.query.shape[:2], rank)
    offset = factors.key_offset.reshape(source.query.shape[:2]) + up @ factors.down[:, -1]
    return Queries(factors.down[:, :-1], channels @ up, np.einsum("hkd,hd->hk", channels, offset))
