"""Grouped attention with fewer KV heads: mean pooling, and principal components that the weights absorb.

Both give an ordinary model of the same family, saved and loaded as such. Groups are of consecutive KV heads.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from kvx.errors import BadInput
from kvx.mesh import place_model, placement_of
from kvx.models.build import Model, abstract_model
from kvx.train.convert.concentrated import principal_components
from kvx.train.convert.factorisation import Metric, joint
from kvx.train.convert.moments import Moments
from kvx.train.convert.report import Converted, Report, cached_elements
from kvx.train.convert.rotary_split import needed
from kvx.train.convert.source import Source, as_channels, check_source, read_source


@dataclass(frozen=True)
class FewerHeads:
    """A conversion to grouped attention with fewer KV heads.

    "mean" averages the keys and values of a group (Ainslie et al. 2023, section 2.1). "svd" keeps the leading principal
    components of a group's keys and values (Yu et al. 2024, "Effectively Compress KV Heads for LLM"): of values in
    general, folded into the output matrix; of keys within each rotary frequency, by complex numbers folded into the
    queries, since only such maps commute with rotation. It never errs by more than the mean does, value by value.

    Attributes:
        kv_heads: how many are left; divides the source's.
        pooling: "mean" or "svd".
        text: the call that makes it.
    """

    kv_heads: int
    pooling: str = "mean"
    text: str = "gqa"

    def __post_init__(self):
        if self.pooling not in ("mean", "svd"):
            raise BadInput(f"pooling={self.pooling!r} is unknown; allowed: mean, svd")

    @property
    def reads_text(self) -> bool:
        """Whether it needs moments."""
        return self.pooling == "svd"

    def shapes(self, model: Model, rank: int | None = None) -> Model:
        """The converted model with shapes for parameters; those of `model` may be shapes too, and no rank is unknown.

        Raises:
            BadInput: a count that does not divide the source's, a layer that cannot be read.
        """
        for layer in range(len(model.blocks)):
            check_source(model, layer)
        heads = min(block.spec.kv_heads for block in model.blocks)
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise BadInput(f"kv_heads={self.kv_heads} is out of range; allowed: divisors of {heads}, the model's")
        config = json.loads(model.source)
        return abstract_model(config | {"num_key_value_heads": self.kv_heads}, model.embedding.table.dtype)

    def __call__(self, model: Model, moments: Sequence[Moments] | None = None) -> tuple[Model, Report]:
        """The model with fewer KV heads in every layer, and what was done.

        Raises:
            BadInput: a count that does not divide the source's, a layer that cannot be read, no moments for "svd".
        """
        changed = self.shapes(model)
        kept = {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)}
        for path, node in nnx.iter_graph(changed):
            if isinstance(node, nnx.Variable) and "qkv" not in path:
                node.set_value(kept[path].get_value())
        lines = []
        for layer, block in enumerate(changed.blocks):
            source = read_source(model, layer)
            pooled, share = self._pooled(source, None if moments is None else moments[layer])
            _write(pooled, block.attention)
            after = cached_elements(changed, layer)
            lines.append(Converted(layer, "grouped", None, source.head_dim, share, source.elements, after))
        placement = placement_of(model)
        if placement is not None:
            changed = place_model(changed, placement.mesh, placement.rules)
        return changed, Report(self.text, tuple(lines), np.dtype(model.embedding.table.dtype).name)

    def _pooled(self, source: Source, moments: Moments | None) -> tuple[Source, float]:
        """The layer with fewer heads, and the share of its keys' and values' energy that is kept."""
        rule = _mean if self.pooling == "mean" else _principal
        if self.reads_text:
            moments = needed(moments, f"pooling={self.pooling!r}")
        inputs = np.eye(source.key.shape[-1]) if moments is None else moments.inputs
        return rule(source, self.kv_heads, inputs)


def _mean(source: Source, kv_heads: int, inputs: Float[np.ndarray, "X X"]) -> tuple[Source, float]:
    both = np.stack([source.key, source.value])
    grouped = both.reshape(2, kv_heads, -1, *both.shape[2:])
    mean = np.mean(grouped, axis=2)
    lost = _energy(grouped - mean[:, :, None], inputs) / _energy(both, inputs)
    return _replaced(source, source.query, mean[0], mean[1], source.out), 1 - lost


def _principal(source: Source, kv_heads: int, inputs: Float[np.ndarray, "X X"]) -> tuple[Source, float]:
    together = source.kv_heads // kv_heads
    query, key, value, out = source.query_pairs.copy(), [], [], source.out.copy()
    kept = 0.0
    for group in range(kv_heads):
        heads = np.arange(group * together, (group + 1) * together)
        readers = np.arange(heads[0] * source.group, (heads[-1] + 1) * source.group)
        mine = (np.arange(len(readers))) // source.group
        part = _replaced(source, source.query[readers], source.key[heads], source.value[heads], source.out[readers])
        components = principal_components(part, inputs, phases=True)
        first = np.arange(len(components.gain)) % together == 0
        key.append(as_channels(components.analysis[first] @ part.key_pairs.reshape(-1, part.key.shape[-1])))
        spread = components.synthesis[:, first].reshape(together, source.head_dim // 2, -1)
        # Each frequency has one component, which only its own pair of each head has a part in.
        query[readers] *= np.einsum("gpp->gp", spread)[mine][..., None].conj()
        values = part.value.reshape(-1, part.value.shape[-1])
        factors = joint(values[:0], values, Metric(inputs=inputs)).at(part.value.shape[1])
        value.append(factors.down)
        up = factors.value_up.reshape(together, part.value.shape[1], -1)[mine]
        out[readers] = np.einsum("hvr,hve->hre", up, part.out)
        kept += float(np.sum(components.gain[first])) + factors.kept * _energy(values, inputs)
    total = _energy(source.key, inputs) + _energy(source.value, inputs)
    return _replaced(source, as_channels(query), np.stack(key), np.stack(value), out), kept / total


def _replaced(source: Source, query, key, value, out) -> Source:
    return replace(source, query=query, key=key, value=value, out=out)


def _energy(rows: Float[np.ndarray, "*batch X"], inputs: Float[np.ndarray, "X X"]) -> float:
    flat = rows.reshape(-1, rows.shape[-1])
    return float(np.einsum("nx,xy,ny->", flat, inputs, flat, optimize=True))


def _write(source: Source, attention) -> None:
    """Put a layer's matrices into the parameters of grouped attention."""
    grouped = source.query.reshape(source.kv_heads, source.group, *source.query.shape[1:])
    rows = np.concatenate([grouped, source.key[:, None], source.value[:, None]], axis=1)
    dtype = attention.qkv.kernel.dtype
    attention.qkv.kernel.set_value(jnp.asarray(np.moveaxis(rows[..., :-1], -1, 0), dtype))
    attention.out.kernel.set_value(jnp.asarray(source.out.reshape(-1, source.out.shape[-1]), dtype))
    if attention.qkv.bias is not None:
        attention.qkv.bias.set_value(jnp.asarray(rows[..., -1], dtype))
