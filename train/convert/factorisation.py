"""Content keys and values from one latent: weighted low-rank factorisations of their stacked matrices.

With M = [content keys ; values] (N + V rows), weights L on its outputs and the inputs' second moments C,

    L M C^(1/2) = U S W^T       ->       M = sum_i (L^-1 u_i) (u_i^T L M),

and its first r terms are the rank-r map with the least mean ||L (M - M_r) x||^2, which is the sum of the other s_i^2
(Palu, Chang et al. 2024, section 3.2, for L = 1; TransMLA's joint PCA of outputs is the same map). With L and C left
out it is the SVD of the weights.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from kvx.errors import BadInput
from kvx.train.convert.moments import Moments
from kvx.train.convert.rotary_split import RotarySplit
from kvx.train.convert.source import Source

DAMPING = 1e-7
"""Added to eigenvalues, as a share of their mean, so that roots have inverses and full rank stays exact."""


@dataclass(frozen=True)
class Metric:
    """In which norm a factorisation's error counts.

    Attributes:
        keys: weights on content keys, symmetric, >= 0; None for equal ones.
        values: on the values of all heads, likewise.
        inputs: second moments of the inputs, about `centre`; None for equal ones.
        centre: the input at which keys and values stay exact, beside what the latent says of the difference. None: the
            latent is linear in the input, biases included.
    """

    keys: Float[np.ndarray, "N N"] | None = None
    values: Float[np.ndarray, "V V"] | None = None
    inputs: Float[np.ndarray, "X X"] | None = None
    centre: Float[np.ndarray, "X"] | None = None


@runtime_checkable
class Weighing(Protocol):
    """A rule that finds the metric of a layer."""

    @property
    def reads_text(self) -> bool:
        """Whether it needs moments."""
        ...

    def __call__(self, source: Source, split: RotarySplit, moments: Moments | None) -> Metric:
        """The metric for the content keys of a split and the values."""
        ...


@dataclass(frozen=True)
class Factors:
    """M x ~ up down x + offset.

    Attributes:
        down: to the latent.
        key_up, value_up: from the latent to content keys, and to the values of all heads.
        key_offset, value_offset: added to them.
        kept: share of the energy, in the metric's norm.
    """

    down: Float[np.ndarray, "R X"]
    key_up: Float[np.ndarray, "N R"]
    value_up: Float[np.ndarray, "V R"]
    key_offset: Float[np.ndarray, "N"]
    value_offset: Float[np.ndarray, "V"]
    kept: float


@dataclass(frozen=True)
class Decomposition:
    """M = up down, terms in the order in which they are kept.

    Attributes:
        up: of unit size in the metric.
        spectrum: size of each term.
        down: singular values included.
        fixed: M of the centre, which is exact at any rank.
        centre: where the latent is zero.
        keys: rows of `up` that are content keys; the others are values.
    """

    up: Float[np.ndarray, "M K"]
    spectrum: Float[np.ndarray, "K"]
    down: Float[np.ndarray, "K X"]
    fixed: Float[np.ndarray, "M"]
    centre: Float[np.ndarray, "X"]
    keys: int

    def at(self, rank: int, singular: Literal["down", "up", "split"] = "down") -> Factors:
        """The first `rank` terms.

        Args:
            singular: which side the singular values go to: "down" as in X-EcoMLA's code, "up" as in MHA2MLA's, "split"
                by their roots as in Palu's. The product is the same, training is not.

        Raises:
            BadInput: a rank above what the layer allows.
        """
        if not 1 <= rank <= len(self.spectrum):
            raise BadInput(f"rank={rank} is out of range; allowed: 1 to {len(self.spectrum)} for this layer")
        share = {"down": 0.0, "split": 0.5, "up": 1.0}[singular]
        spectrum = self.spectrum[:rank]
        moved = np.where(spectrum > 0, spectrum, 1.0) ** share
        up, down = self.up[:, :rank] * moved, self.down[:rank] / moved[:, None]
        offset = self.fixed - up @ (down @ self.centre)
        energy = np.sum(self.spectrum**2)
        return Factors(
            down, up[: self.keys], up[self.keys :], offset[: self.keys], offset[self.keys :],
            kept=float(np.sum(spectrum**2) / energy) if energy else 1.0,
        )  # fmt: skip


def joint(key: Float[np.ndarray, "N X"], value: Float[np.ndarray, "V X"], metric: Metric) -> Decomposition:
    """One SVD for both: a latent channel serves keys and values."""
    keys, values = _roots(metric.keys, len(key)), _roots(metric.values, len(value))
    inputs, _ = _roots(metric.inputs, key.shape[1])
    stacked = np.concatenate([key, value])
    centre = np.zeros(key.shape[1]) if metric.centre is None else metric.centre
    seen = stacked.copy()
    if metric.centre is not None:
        seen[:, -1] = 0  # differences from the centre have no channel of ones
    weighted = np.concatenate([keys[0] @ seen[: len(key)], values[0] @ seen[len(key) :]])
    left, spectrum, _ = np.linalg.svd(weighted @ inputs, full_matrices=False)
    up = np.concatenate([keys[1] @ left[: len(key)], values[1] @ left[len(key) :]])
    return Decomposition(up, spectrum, left.T @ weighted, stacked @ centre, centre, len(key))


def separate(key: Float[np.ndarray, "N X"], value: Float[np.ndarray, "V X"], metric: Metric) -> Decomposition:
    """Two SVDs: each latent channel serves keys or values, the stronger first."""
    one = joint(key, value[:0], replace(metric, values=None))
    other = joint(key[:0], value, replace(metric, keys=None))
    up = np.zeros((len(key) + len(value), len(one.spectrum) + len(other.spectrum)))
    up[: len(key), : len(one.spectrum)] = one.up
    up[len(key) :, len(one.spectrum) :] = other.up
    spectrum = np.concatenate([one.spectrum, other.spectrum])
    order = np.argsort(-spectrum, kind="stable")
    down, fixed = np.concatenate([one.down, other.down]), np.concatenate([one.fixed, other.fixed])
    return Decomposition(up[:, order], spectrum[order], down[order], fixed, one.centre, len(key))


def _roots(
    weights: Float[np.ndarray, "N N"] | None, size: int
) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, "N N"]]:
    """The symmetric root of a positive matrix, and its inverse."""
    if weights is None:
        return np.eye(size), np.eye(size)
    values, axes = np.linalg.eigh(weights)
    root = np.sqrt(np.maximum(values, 0) + DAMPING * max(np.sum(values) / max(size, 1), np.finfo(float).tiny))
    return (axes * root) @ axes.T, (axes / root) @ axes.T
