"""Conversions to latent attention: the fold of a recipe's parts over the layers of a model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from kvx.decoder import AttentionSpec
from kvx.errors import BadInput
from kvx.models.build import Model, abstract_model
from kvx.models.latent_layers import SECTION, LatentLayer, latent_layers, section
from kvx.models.mla import LatentConfig
from kvx.models.upcycle import LatentWeights, with_latent_attention
from kvx.train.convert.assemble import assemble
from kvx.train.convert.factorisation import Decomposition, Factors, Weighing, joint
from kvx.train.convert.moments import Moments
from kvx.train.convert.query_latent import Direct, QueryRule
from kvx.train.convert.ranks import Ranks
from kvx.train.convert.report import Converted, Report, cached_elements
from kvx.train.convert.rotary_split import RotarySplit, Split, needed
from kvx.train.convert.source import Source, check_source, read_source

DIRECT = Direct()


@dataclass(frozen=True)
class Recipe:
    """A conversion to latent attention, put together from parts.

    Attributes:
        text: the call that makes it, e.g. "transmla(rank=64, rotary=32)".
        split: which part of the keys goes on rotating.
        weighing: which errors of the rest count.
        ranks: how many latent channels each layer gets.
        factorise: `joint` or `separate`.
        singular: where singular values go.
        queries: how they are made: `Direct()`, or with a latent of their own.
        layers: "all", or the indices of those to convert; the others keep their attention.
        norm: RMS norm on the latent, its gain such that a latent of average size passes unchanged.
    """

    split: Split
    weighing: Weighing
    ranks: Ranks
    factorise: Callable[..., Decomposition] = joint
    singular: Literal["down", "up", "split"] = "down"
    queries: QueryRule = DIRECT
    layers: Literal["all"] | tuple[int, ...] = "all"
    norm: bool = False
    text: str = "recipe"

    @property
    def reads_text(self) -> bool:
        """Whether it needs moments."""
        return self.norm or self.split.reads_text or self.weighing.reads_text or self.queries.reads_text

    def shapes(self, model: Model, rank: int | None = None) -> Model:
        """The converted model with shapes for parameters, its frequencies zeros; biases, which weights tell, left out.

        Args:
            model: its parameters may be shapes.
            rank: what stands for ranks that follow from weights; None: they are refused.

        Raises:
            BadInput: layers that do not exist, attention that cannot be converted, widths that it does not have.
        """
        count, config = len(model.blocks), json.loads(model.source)
        width = model.embedding.table.shape[1]
        found = latent_layers(config, count)
        for layer in chosen_layers(self.layers, count):
            check_source(model, layer)
            found[layer] = LatentLayer(
                self._config(model.blocks[layer].spec, width, rank), np.zeros(self.split.rotary // 2, np.float32)
            )
        return abstract_model(config | {SECTION: section(found)}, model.embedding.table.dtype)

    def _config(self, spec: AttentionSpec, width: int, stand_in: int | None) -> LatentConfig:
        widths = self.split.widths(spec.kv_heads, spec.key_dim)
        rows, columns = (widths.rows, spec.kv_heads * spec.value_dim), width + 1
        most = min(sum(rows), columns) if self.factorise is joint else sum(min(each, columns) for each in rows)
        rank, query_rank = self.ranks.known(most), self.queries.known(min(spec.heads * spec.key_dim, columns))
        latent_queries = self.queries != DIRECT
        if stand_in is None and (rank is None or (latent_queries and query_rank is None)):
            raise BadInput(
                f"{self.text} has ranks that are known once its weights are; allowed for shapes without weights: "
                "fixed ones"
            )
        return LatentConfig(
            heads=spec.heads,
            rank=rank or stand_in or 1,
            rotary=self.split.rotary,
            blocks=widths.blocks,
            content=widths.content,
            value=spec.value_dim,
            query_rank=(query_rank or stand_in) if latent_queries else None,
            latent_norm=self.norm,
            scale=spec.scale,
        )

    def __call__(self, model: Model, moments: Sequence[Moments] | None = None) -> tuple[Model, Report]:
        """The converted model, and what was done to each layer; the source model stays as it is.

        Raises:
            BadInput: layers that do not exist, widths that they do not have, or no moments where they are needed.
        """
        count = len(model.blocks)
        layers = chosen_layers(self.layers, count)
        if moments is not None and len(moments) != count:
            raise BadInput(f"moments has {len(moments)} layers; allowed: {count}, the model's")
        known = [None if moments is None else moments[layer] for layer in layers]
        sources = [read_source(model, layer) for layer in layers]
        splits = [self.split(*each) for each in zip(sources, known, strict=True)]
        found = [self._decomposed(*each) for each in zip(sources, splits, known, strict=True)]
        ranks = self.ranks([each.spectrum for each in found], layers, count)
        factors = [each.at(rank, self.singular) for each, rank in zip(found, ranks, strict=True)]
        queries = self.queries(sources, splits, known, layers, count)
        norms = [self._gain(*each) for each in zip(factors, known, strict=True)]
        latent = [assemble(*each) for each in zip(sources, splits, factors, queries, norms, strict=True)]
        converted = with_latent_attention(model, dict(zip(layers, latent, strict=True)))
        return converted, _report(self.text, model, layers, latent, factors)

    def _decomposed(self, source: Source, split: RotarySplit, moments: Moments | None) -> Decomposition:
        values = source.value.reshape(-1, source.value.shape[-1])
        return self.factorise(split.content_key, values, self.weighing(source, split, moments))

    def _gain(self, factors: Factors, moments: Moments | None) -> Float[np.ndarray, "R"] | None:
        """The mean size of the latent's channels, so that c / rms(c) comes back to about c."""
        if not self.norm:
            return None
        inputs = needed(moments, "norm=True").inputs
        power = np.sum((factors.down @ inputs) * factors.down, axis=1)
        return np.full(len(power), np.sqrt(np.mean(power)))


def chosen_layers(layers: Any, count: int) -> tuple[int, ...]:
    """Indices in order, without doubles.

    Raises:
        BadInput: none, or some that the model does not have.
    """
    if layers == "all":
        return tuple(range(count))
    if isinstance(layers, str) or not layers or any(type(layer) is not int for layer in layers):
        raise BadInput(f'layers={layers!r}; allowed: "all", or at least one index from 0 to {count - 1}')
    if min(layers) < 0 or max(layers) >= count:
        raise BadInput(f"layers={tuple(layers)} names a layer that does not exist; allowed: 0 to {count - 1}")
    return tuple(sorted(set(layers)))


def _report(
    text: str, model: Model, layers: tuple[int, ...], latent: list[LatentWeights], factors: list[Factors]
) -> Report:
    done = {layer: (one.config, each.kept) for layer, one, each in zip(layers, latent, factors, strict=True)}
    lines = []
    for layer, block in enumerate(model.blocks):
        before = cached_elements(model, layer)
        if layer in done:
            config, kept = done[layer]
            lines.append(Converted(layer, "latent", config.rank, config.rotary, kept, before, config.cached))
        else:
            lines.append(Converted(layer, "kept", None, block.rotary.width, 1.0, before, before))
    return Report(text, tuple(lines), np.dtype(model.embedding.table.dtype).name)
