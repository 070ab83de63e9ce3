"""One layer's trained attention as float64 arrays: what every conversion starts from.

Two conventions carry the rest of this folder. The layer's normed input x has a last channel that is always 1, so that
biases are one more column of every matrix (X = width + 1). And a rotary pair is one complex number, real part first:
rotation by position is multiplication by exp(i theta t), and a logit is the real part of conj(q) k summed over pairs,
so that whatever mixes keys of one frequency by complex numbers commutes with rotation.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Complex, Float

from kvx.errors import BadInput
from kvx.models.build import Model


@dataclass(frozen=True)
class Source:
    """Attention of H query heads over G KV heads of width D, as matrices (out, in) of the normed input.

    Attributes:
        query, key, value: rows of every head; the last column is the bias.
        out: what takes each head's output to the residual stream.
        out_bias: of the residual stream, or None.
        frequencies: radians per position of each rotary pair, scaling (Llama 3, linear) applied.
        magnitude: factor on cos and sin (YaRN).
        scale: factor on logits.
        config: the model's, as in a Hugging Face config.json.
    """

    query: Float[np.ndarray, "H D X"]
    key: Float[np.ndarray, "G D X"]
    value: Float[np.ndarray, "G V X"]
    out: Float[np.ndarray, "H V E"]
    out_bias: Float[np.ndarray, "E"] | None
    frequencies: Float[np.ndarray, "P"]
    magnitude: float
    scale: float
    config: Mapping[str, Any]

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.query.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads G."""
        return self.key.shape[0]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def head_dim(self) -> int:
        """Width D of queries and keys."""
        return self.key.shape[1]

    @property
    def elements(self) -> int:
        """Numbers that the layer caches for each token."""
        return self.key.shape[0] * (self.key.shape[1] + self.value.shape[1])

    @property
    def query_pairs(self) -> Complex[np.ndarray, "H P X"]:
        """Query rows, one complex row for each rotary pair."""
        return as_pairs(self.query)

    @property
    def key_pairs(self) -> Complex[np.ndarray, "G P X"]:
        """Key rows, one complex row for each rotary pair."""
        return as_pairs(self.key)


def as_pairs(rows: Float[np.ndarray, "*batch D X"]) -> Complex[np.ndarray, "*batch P X"]:
    """Rows in the half-split layout of checkpoints as complex rows: channel j with channel j + D / 2."""
    half = rows.shape[-2] // 2
    return rows[..., :half, :] + 1j * rows[..., half:, :]


def as_channels(pairs: Complex[np.ndarray, "*batch P X"]) -> Float[np.ndarray, "*batch D X"]:
    """The inverse of `as_pairs`: all real parts, then all imaginary parts."""
    return np.concatenate([np.real(pairs), np.imag(pairs)], axis=-2)


def as_real_map(pairs: Complex[np.ndarray, "*batch P N"]) -> Float[np.ndarray, "*batch D M"]:
    """The real matrix (2P, 2N) of a complex one (P, N), between half-split layouts."""
    return np.block([[np.real(pairs), -np.imag(pairs)], [np.imag(pairs), np.real(pairs)]])


def check_source(model: Model, layer: int) -> None:
    """Refuse what `read_source` cannot read; parameters may be shapes.

    Raises:
        BadInput: no such layer, a layer that is latent already, or norms on queries and keys (Qwen3, Gemma 3).
    """
    if not 0 <= layer < len(model.blocks):
        raise BadInput(f"layer={layer} does not exist; allowed: 0 to {len(model.blocks) - 1}")
    attention = model.blocks[layer].attention
    if not hasattr(attention, "qkv"):
        raise BadInput(f"layer={layer} has latent attention already; allowed: a layer of ordinary attention")
    if attention.q_norm is not None:
        raise BadInput(
            f"layer={layer} norms its queries and keys before they are rotated, which no linear map of them commutes "
            "with; allowed: a model without such norms (not Qwen3, not Gemma 3)"
        )


def read_source(model: Model, layer: int) -> Source:
    """The attention of one layer of a model of `kvx.models`.

    Raises:
        BadInput: as `check_source`.
    """
    check_source(model, layer)
    attention = model.blocks[layer].attention
    spec = attention.spec
    fused = _with_bias(attention.qkv.kernel, attention.qkv.bias)
    rotary = attention.rotary
    bias = attention.out.bias
    return Source(
        query=fused[:, :-2].reshape(spec.heads, spec.key_dim, -1),
        key=fused[:, -2],
        value=fused[:, -1],
        out=_float64(attention.out.kernel).reshape(spec.heads, spec.value_dim, -1),
        out_bias=None if bias is None else _float64(bias),
        frequencies=np.asarray(rotary.frequencies, np.float64),
        magnitude=float(rotary.magnitude),
        scale=spec.scale,
        config=json.loads(model.source),
    )


def _with_bias(kernel, bias) -> Float[np.ndarray, "G R D X"]:
    """A kernel (E, *out) as rows (*out, E + 1)."""
    rows = np.moveaxis(_float64(kernel), 0, -1)
    column = np.zeros(rows.shape[:-1]) if bias is None else _float64(bias)
    return np.concatenate([rows, column[..., None]], axis=-1)


def _float64(parameter) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)
