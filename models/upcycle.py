"""A model whose chosen layers have latent attention: their weights from a conversion, everything else shared."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from kvx.errors import BadInput
from kvx.mesh import place_model, placement_of
from kvx.models.build import Model, abstract_model
from kvx.models.latent_layers import SECTION, LatentLayer, latent_layers, section
from kvx.models.mla import LatentAttention, LatentConfig


class LatentWeights(NamedTuple):
    """One layer's latent attention; a plain tuple serves as well.

    Attributes:
        config: widths and switches.
        weights: arrays (in, *out) by parameter: "q", or "q_a" and "q_b"; "kv_a", "kv_b", "out"; gains "q_norm" and
            "kv_norm" and biases "q_bias" ("q_b_bias"), "kv_a_bias", "out_bias" where the config has them. Rotary
            channels half-split, see `kvx.models.mla`; cast to the model's dtype.
        frequencies: radians per position, one per rotary pair.
        magnitude: factor on cos and sin.
    """

    config: LatentConfig
    weights: Mapping[str, Float[np.ndarray, "..."]]
    frequencies: Float[np.ndarray, "P"]
    magnitude: float = 1.0


def with_latent_attention(model: Model, layers: Mapping[int, LatentWeights | tuple[Any, ...]]) -> Model:
    """A new model whose named layers have latent attention; the others, and all else, share the old one's arrays.

    Args:
        model: stays as it is; layers that are latent already stay latent unless they are named.
        layers: by index, from 0.

    Raises:
        BadInput: a layer that does not exist, a weight that is missing, unknown, or of a wrong shape.
    """
    count = len(model.blocks)
    wanted = {}
    for layer, given in layers.items():
        if type(layer) is not int or not 0 <= layer < count:
            raise BadInput(f"layers names layer {layer!r}: expected 0 to {count - 1}, the model's layers")
        wanted[layer] = given if isinstance(given, LatentWeights) else LatentWeights(*given)
    source = json.loads(model.source)
    described = latent_layers(source, count) | {
        layer: LatentLayer(each.config, np.asarray(each.frequencies, np.float32), float(each.magnitude))
        for layer, each in wanted.items()
    }
    dtype = model.embedding.table.dtype
    converted = abstract_model(source | {SECTION: section(described)}, dtype)
    old = dict(_variables(model))
    for path, variable in _variables(converted):
        if not (path[0] == "blocks" and path[1] in wanted and path[2] == "attention"):
            variable.set_value(old[path].get_value())
    for layer, each in wanted.items():
        _fill(layer, converted.blocks[layer].attention, each.weights)
    placement = placement_of(model)
    return converted if placement is None else place_model(converted, placement.mesh, placement.rules)


def parameters(attention: LatentAttention) -> dict[str, nnx.Param]:
    """The parameters of a latent layer by the names that `LatentWeights.weights` has for them."""
    found = {}
    for name in ("q", "q_a", "q_b", "kv_a", "kv_b", "out"):
        if (linear := getattr(attention, name)) is not None:
            found[name] = linear.kernel
            if linear.bias is not None:
                found[f"{name}_bias"] = linear.bias
    for name in ("q_norm", "kv_norm"):
        if (norm := getattr(attention, name)) is not None:
            found[name] = norm.weight
    return found


def _fill(layer: int, attention: LatentAttention, weights: Mapping[str, Any]) -> None:
    expected = parameters(attention)
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())[0]
        raise BadInput(
            f"weights of layer {layer} {'have' if odd in weights else 'lack'} {odd!r}: expected {sorted(expected)}"
        )
    for name, parameter in expected.items():
        if np.shape(weights[name]) != parameter.shape:
            raise BadInput(
                f"weight {name!r} of layer {layer} has shape {np.shape(weights[name])}: expected {parameter.shape}"
            )
        parameter.set_value(jnp.asarray(weights[name], parameter.dtype))


def _variables(model: Model) -> list[tuple[tuple[Any, ...], nnx.Variable]]:
    """Every variable of a model with its path."""
    return [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)]
