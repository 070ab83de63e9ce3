"""How many latent channels each layer gets: fixed, by its own energy, or from one budget for all layers."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from kvx.errors import BadInput


@runtime_checkable
class Ranks(Protocol):
    """A rule that gives every converted layer its rank."""

    def known(self, most: int) -> int | None:
        """What every layer gets, whatever its weights; None: they tell. Raises BadInput for more than `most`."""
        ...

    def __call__(self, spectra: Sequence[Float[np.ndarray, "_"]], layers: Sequence[int], count: int) -> tuple[int, ...]:
        """One rank for each layer's spectrum.

        Args:
            spectra: singular values in the order in which they are kept.
            layers: the converted layers' indices in the model, one for each spectrum.
            count: layers of the model, those that stay included.
        """
        ...


@dataclass(frozen=True)
class Fixed:
    """The same rank in every layer.

    Attributes:
        name: of the setting, for refusals.
    """

    rank: int
    name: str = "rank"

    def known(self, most: int) -> int:
        """The rank."""
        return _within(self.rank, most, self.name)

    def __call__(self, spectra: Sequence[Float[np.ndarray, "_"]], layers: Sequence[int], count: int) -> tuple[int, ...]:
        """As many as there are layers."""
        return (self.rank,) * len(spectra)


@dataclass(frozen=True)
class Energy:
    """As many channels as keep a share of the energy (X-EcoMLA, Li et al. 2025): #{k : e_k <= share}, at least 1,
    rounded up to a multiple of 8; e_k is the energy of the first k. That is one less than the smallest k to reach the
    share.

    Attributes:
        share: of the squared singular values, 0 to 1.
        ends: rank of the model's first and last layer, whatever their energy; None: as the others.
        name: of `ends` as a setting, for refusals.
        share_name: of `share`.
    """

    share: float
    ends: int | None = None
    name: str = "rank"
    share_name: str = "share"

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise BadInput(f"{self.share_name}={self.share} is out of range; allowed: above 0, up to 1")

    def known(self, most: int) -> None:
        """Of the ends alone."""
        if self.ends is not None:
            _within(self.ends, most, self.name)

    def __call__(self, spectra: Sequence[Float[np.ndarray, "_"]], layers: Sequence[int], count: int) -> tuple[int, ...]:
        """At most what the spectrum has without zeros."""
        return tuple(
            self.ends if self.ends is not None and layer in (0, count - 1) else self._one(spectrum)
            for layer, spectrum in zip(layers, spectra, strict=True)
        )

    def _one(self, spectrum: Float[np.ndarray, "_"]) -> int:
        # Beyond these, only rounding tells singular values from zero, and e_k from 1.
        real = int(np.sum(spectrum > 1e-12 * spectrum[0]))
        energy = np.cumsum(spectrum[:real] ** 2)
        count = max(1, int(np.sum(energy <= self.share * energy[-1] * (1 + 1e-12))))
        return min(rounded_up(count, 8), real)


@dataclass(frozen=True)
class Budget:
    """One total for all layers: each run of `multiple` channels goes to the layer where it saves the most energy.

    Each layer's energy counts as its own share.

    Attributes:
        mean: channels a layer, on average; the total is conserved.
        least: of every layer.
        multiple: what ranks are multiples of.
        name: of `mean` as a setting, for refusals.
    """

    mean: int
    least: int = 8
    multiple: int = 8
    name: str = "mean"

    def __post_init__(self):
        if self.multiple < 1 or self.least < 1 or self.least % self.multiple:
            raise BadInput(f"least={self.least} is out of range; allowed: multiples of multiple={self.multiple}")
        if self.mean < self.least or self.mean % self.multiple:
            raise BadInput(
                f"{self.name}={self.mean} is out of range; allowed: multiples of {self.multiple} from {self.least} on"
            )

    def known(self, most: int) -> None:
        """Not before the spectra are."""
        _within(self.mean, most, self.name)

    def __call__(self, spectra: Sequence[Float[np.ndarray, "_"]], layers: Sequence[int], count: int) -> tuple[int, ...]:
        """Raises BadInput if all layers together have less."""
        ranks = [self.least] * len(spectra)
        energies = [spectrum**2 / np.sum(spectrum**2) for spectrum in spectra]
        heap = [(-self._next(energy, self.least), self.least, layer) for layer, energy in enumerate(energies)]
        heapq.heapify(heap)
        for _ in range((self.mean - self.least) * len(spectra) // self.multiple):
            gain, _, layer = heapq.heappop(heap)  # of equal gains, that of the least rank
            if gain > 0:
                raise BadInput(
                    f"{self.name}={self.mean} of {len(spectra)} layers is out of range; allowed: in all layers "
                    f"{sum(map(len, spectra))}, which they have"
                )
            ranks[layer] += self.multiple
            heapq.heappush(heap, (-self._next(energies[layer], ranks[layer]), ranks[layer], layer))
        return tuple(ranks)

    def _next(self, energy: Float[np.ndarray, "_"], rank: int) -> float:
        """What the next channels save; below zero where there are none."""
        end = rank + self.multiple
        return float(np.sum(energy[rank:end])) if end <= len(energy) else -1.0


def rounded_up(count: int, multiple: int) -> int:
    """The least multiple that is not below `count`."""
    return -(-count // multiple) * multiple


def _within(rank: int, most: int, name: str) -> int:
    if not 1 <= rank <= most:
        raise BadInput(f"{name}={rank} is out of range; allowed: 1 to {most} for this layer")
    return rank
