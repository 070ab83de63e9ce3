"""Means with their 95 % intervals: Wilson's for shares, Student's for means, the bootstrap for other scores."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri, stdtrit

RESAMPLES = 10_000
_NORMAL = float(ndtri(0.975))


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: of what was measured.
        low, high: the interval's ends; the mean itself where there is one number and nothing is known of its spread.
        count: numbers that it is the mean of.
    """

    mean: float
    low: float
    high: float
    count: int = 1

    @classmethod
    def of(cls, values: Float[np.ndarray, "N"]) -> "Interval":
        """Of numbers without bounds: Student's t, with the numbers as what is drawn."""
        mean, count = float(np.mean(values)), len(values)
        if count == 1:
            return cls(mean, mean, mean, 1)
        half = float(stdtrit(count - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(count)
        return cls(mean, mean - half, mean + half, count)

    @classmethod
    def wilson(cls, values: Float[np.ndarray, "N"]) -> "Interval":
        """Of zeros and ones (Wilson 1927): within [0, 1], and of some width where all are equal."""
        share, count = float(np.mean(values)), len(values)
        square = _NORMAL**2
        middle = (share + square / (2 * count)) / (1 + square / count)
        half = _NORMAL / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
        # Its ends are 0 and 1 themselves where all are equal; arithmetic leaves them a rounding away.
        return cls(share, min(max(0.0, middle - half), share), max(min(1.0, middle + half), share), count)

    @classmethod
    def bootstrap(cls, values: Float[np.ndarray, "N"], seed: int = 0) -> "Interval":
        """Of numbers of any distribution: the middle 95 % of means of samples drawn with replacement (Efron 1979)."""
        random = np.random.default_rng(seed)
        drawn = random.integers(len(values), size=(RESAMPLES, len(values)))
        low, high = np.quantile(np.asarray(values)[drawn].mean(axis=1), (0.025, 0.975))
        return cls(float(np.mean(values)), float(low), float(high), len(values))

    @classmethod
    def paired_shares(cls, values: Float[np.ndarray, "N"], others: Float[np.ndarray, "N"]) -> "Interval":
        """Of the difference of two shares of the same samples, zeros and ones (Bonett and Price 2012).

        A sample each way is added before the normal interval is taken, so it has some width where no sample differs.
        """
        count = len(values)
        gained = (float(np.sum(values > others)) + 1) / (count + 2)
        lost = (float(np.sum(values < others)) + 1) / (count + 2)
        middle = gained - lost
        half = _NORMAL * math.sqrt((gained + lost - middle**2) / (count + 2))
        mean = float(np.mean(values - others))
        return cls(mean, max(-1.0, min(middle - half, mean)), min(1.0, max(middle + half, mean)), count)

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"
