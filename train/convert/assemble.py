"""A layer's split and factors as the parameters of latent attention (`kvx.models.mla`)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kvx.models.mla import LatentConfig
from kvx.models.upcycle import LatentWeights
from kvx.train.convert.factorisation import Factors
from kvx.train.convert.rotary_split import RotarySplit
from kvx.train.convert.source import Source, as_channels


@dataclass(frozen=True)
class Queries:
    """q = up (down x) + offset for all heads, [content ; rotary] each; `down` is None where there is no query latent.

    Attributes:
        up: of the query latent, without bias, or of the input.
    """

    down: Float[np.ndarray, "Q E"] | None
    up: Float[np.ndarray, "H K I"]
    offset: Float[np.ndarray, "H K"]


def assemble(
    source: Source,
    split: RotarySplit,
    factors: Factors,
    queries: Queries,
    norm: Float[np.ndarray, "R"] | None = None,
) -> LatentWeights:
    """One latent attention layer.

    The constant part of content keys is left out, since it adds the same to every logit of a query; that of the values
    adds a constant to the layer's output, and becomes its bias.

    Args:
        norm: gain of the RMS norm on the latent; None for no norm.
    """
    rank, width = factors.down.shape
    owner = np.arange(source.heads) // source.group
    content = split.lift @ factors.key_up
    value = factors.value_up.reshape(source.kv_heads, -1, rank)[owner]
    rows = np.concatenate([factors.down, as_channels(split.rotary_key.reshape(-1, width))])
    offset = np.einsum("hv,hve->e", factors.value_offset.reshape(source.kv_heads, -1)[owner], source.out)
    out_bias = offset if source.out_bias is None else offset + source.out_bias
    direct = queries.down is None
    config = LatentConfig(
        heads=source.heads,
        rank=rank,
        rotary=split.rotary,
        blocks=len(split.rotary_key),
        content=content.shape[1],
        value=value.shape[1],
        query_rank=None if queries.down is None else len(queries.down),
        latent_norm=norm is not None,
        scale=source.scale,
        bias=bool(np.any(queries.offset) or np.any(rows[:, -1])),
        out_bias=bool(np.any(out_bias)),
    )
    weights = {
        "kv_a": rows[:, :-1].T,
        "kv_b": np.moveaxis(np.concatenate([content, value], axis=1), -1, 0),
        "out": source.out.reshape(-1, source.out.shape[-1]),
        "q" if direct else "q_b": np.moveaxis(queries.up, -1, 0),
    }
    if queries.down is not None:
        weights["q_a"] = queries.down.T
    if config.bias:
        weights |= {"q_bias" if direct else "q_b_bias": queries.offset, "kv_a_bias": rows[:, -1]}
    if config.out_bias:
        weights["out_bias"] = out_bias
    if norm is not None:
        weights["kv_norm"] = norm
    return LatentWeights(config, weights, split.frequencies.ravel(), split.magnitude)


def query_rows(split: RotarySplit) -> Float[np.ndarray, "H K X"]:
    """What every query head computes of the input, in the order of the parameters: content, then rotary channels."""
    return np.concatenate([split.content_query, as_channels(split.rotary_query)], axis=1)
