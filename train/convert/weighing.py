"""Which errors of keys and values count, and how much: the metrics of the factorisation."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kvx.errors import BadInput
from kvx.train.convert.factorisation import Metric
from kvx.train.convert.moments import Moments, about_mean
from kvx.train.convert.rotary_split import RotarySplit, needed
from kvx.train.convert.source import Source


@dataclass(frozen=True)
class ByWeights:
    """Every entry of the matrices alike; biases stay outside the latent (X-EcoMLA, MHA2MLA)."""

    reads_text = False

    def __call__(self, source: Source, split: RotarySplit, moments: Moments | None = None) -> Metric:
        """No text is looked at."""
        nothing = np.zeros(split.content_key.shape[1])
        nothing[-1] = 1
        return Metric(centre=nothing)


@dataclass(frozen=True)
class ByActivations:
    """Squared errors of keys and values over real inputs, keys brought to the values' size first (TransMLA's BKV).

    rho = mean_j ||k_j|| / (alpha mean_j ||v_j||), norms of channels over all tokens; keys are divided by it.

    Attributes:
        alpha: how large balanced keys are beside values.
    """

    alpha: float = 1.0
    reads_text = True

    def __post_init__(self):
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise BadInput(f"alpha={self.alpha} is out of range; allowed: a finite number above 0")

    def __call__(self, source: Source, split: RotarySplit, moments: Moments | None) -> Metric:
        """Raises BadInput without moments."""
        inputs = needed(moments, "a factorisation by activations").inputs
        if not len(split.content_key):
            return Metric(inputs=inputs)
        values = source.value.reshape(-1, source.value.shape[-1])
        rho = np.mean(_norms(split.content_key, inputs)) / (self.alpha * np.mean(_norms(values, inputs)))
        return Metric(keys=np.eye(len(split.content_key)) / rho**2, inputs=inputs)


@dataclass(frozen=True)
class ByEffect:
    """Errors by what they do to the layer's output, to first order: the sum over heads h of

        E (p dlogit)^2 ||W_O^h (v - o)||^2 + E p^2 ||W_O^h dv||^2.

    So a content key's error counts by the second moments of the queries that meet it, in the size of what its logit
    moves, and a value's by the output matrix. Inputs are taken about their mean: what all keys share no softmax sees,
    and what all values share goes to the output's bias.

    Attributes:
        attended: count each token by the attention that it gets, as the sums over j of p_ij do; otherwise all alike.
    """

    attended: bool = True
    reads_text = True

    def __call__(self, source: Source, split: RotarySplit, moments: Moments | None) -> Metric:
        """Raises BadInput without moments."""
        moments = needed(moments, "a factorisation by effect")
        queries = head_moments(split.content_query, moments.inputs)
        keys = np.einsum(
            "h,hcn,hcd,hdm->nm", logit_effects(source, moments), split.lift, queries, split.lift, optimize=True
        )
        grouped = source.out.reshape(source.kv_heads, -1, *source.out.shape[1:])
        width = source.value.shape[1]
        values = np.zeros((source.kv_heads, width, source.kv_heads, width))
        index = np.arange(source.kv_heads)
        values[index, :, index] = np.einsum("grve,grwe->gvw", grouped, grouped)
        values = values.reshape(source.kv_heads * width, -1)
        inputs = moments.attended if self.attended else moments.inputs
        return Metric(keys, values, about_mean(inputs), inputs[:, -1])


def logit_effects(source: Source, moments: Moments) -> Float[np.ndarray, "H"]:
    """What a unit error of q . k does to the layer's output, squared: scale^2 E ||W_O^h (v - E v)||^2."""
    owner = np.arange(source.heads) // source.group
    spread = head_moments(source.value, about_mean(moments.inputs))[owner]
    return source.scale**2 * np.sum((spread @ source.out) * source.out, axis=(1, 2))


def head_moments(rows: Float[np.ndarray, "H C X"], inputs: Float[np.ndarray, "X X"]) -> Float[np.ndarray, "H C C"]:
    """Second moments of what each head's rows make of the inputs."""
    return rows @ inputs @ rows.transpose(0, 2, 1)


def _norms(rows: Float[np.ndarray, "N X"], inputs: Float[np.ndarray, "X X"]) -> Float[np.ndarray, "N"]:
    return np.sqrt(np.sum((rows @ inputs) * rows, axis=1))
