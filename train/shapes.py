"""The models of a job as shapes: what its source and its conversion come to, without any weight."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvx.decoder import AttentionSpec
from kvx.errors import BadInput
from kvx.models.build import Model, abstract_model
from kvx.models.latent_layers import SECTION, LatentLayer, section
from kvx.models.mla import LatentConfig
from kvx.train.job import ConvertSection, Job

WIDTHS_BY_OPTIONS = "x_ecomla"
"""The recipe whose content width is the head's less the rotary one; others keep more (`kvx.train.convert`)."""


def model_shapes(job: Job) -> tuple[Model, Model]:
    """Student and teacher, with shapes for parameters.

    Raises:
        BadInput: no config of the source or the teacher; a conversion whose widths follow from weights, not options.
    """
    config = model_config(job.model, job.shapes)
    source = abstract_model(config, jnp.bfloat16)
    chosen = range(len(source.blocks)) if job.convert.layers == "all" else job.convert.layers
    layers = {} if job.convert.recipe == "none" else {i: _latent(job.convert, source.blocks[i].spec) for i in chosen}
    student = abstract_model({**config, SECTION: section(layers)}, jnp.bfloat16)
    if job.teacher.model is None:
        return student, abstract_model(config, jnp.dtype(job.teacher.dtype))
    return student, abstract_model(model_config(job.teacher.model, job.teacher.shapes), jnp.dtype(job.teacher.dtype))


def model_config(model: str, shapes: str | None = None) -> Mapping[str, Any]:
    """The config.json of a model: that of its checkpoint, or the file named instead, which needs no checkpoint.

    Raises:
        BadInput: a file that cannot be read, a model that cannot be found.
    """
    if shapes is not None:
        try:
            return json.loads(Path(shapes).read_text())
        except (OSError, ValueError) as error:
            raise BadInput(f"shapes={shapes!r} cannot be read: {error}; allowed: a config.json") from None
    from kvx.models.readers import read_checkpoint
    from kvx.models.zoo import resolve

    return read_checkpoint(resolve(model)).config


def _latent(convert: ConvertSection, spec: AttentionSpec) -> LatentLayer:
    """Widths of a layer; its frequencies, which no shape depends on, are zeros."""
    options = convert.options
    if convert.recipe != WIDTHS_BY_OPTIONS:
        raise BadInput(
            f"recipe={convert.recipe!r} has widths that are known once its weights are; allowed for shapes without "
            f"weights: {WIDTHS_BY_OPTIONS}, none"
        )
    if not isinstance(options.get("rank"), int) or not isinstance(options.get("rotary"), int):
        raise BadInput(
            f"rank and rotary of recipe {convert.recipe!r} are not both fixed; allowed: integers, for shapes"
        )
    rotary = options["rotary"]
    config = LatentConfig(
        heads=spec.heads,
        rank=options["rank"],
        rotary=rotary,
        content=spec.key_dim - rotary,
        value=spec.value_dim,
        query_rank=options.get("query_rank"),
        scale=spec.scale,
    )
    return LatentLayer(config, np.zeros(rotary // 2, np.float32))
