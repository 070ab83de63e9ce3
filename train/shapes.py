"""The models of a job as shapes: what its source and its conversion come to, without any weight."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from kvx.errors import BadInput, unknown
from kvx.models.build import Model, abstract_model
from kvx.train.job import Job

NO_CONVERSION = "none"
"""The recipe that leaves the model as it is."""

TELLING = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
TELLING += ("head_dim", "vocab_size", "max_position_embeddings", "architectures")
"""Keys of a config.json that tell one model from another: what widths, layers and positions are checked by."""


def model_shapes(job: Job) -> tuple[Model, Model]:
    """Student and teacher, with shapes for parameters.

    Raises:
        BadInput: no config of the source or the teacher; a conversion whose widths follow from weights, not options.
    """
    config = model_config(job.model, job.shapes)
    student = student_shapes(job, abstract_model(config, jnp.bfloat16))
    if job.teacher.model is None:
        return student, abstract_model(config, jnp.dtype(job.teacher.dtype))
    return student, abstract_model(model_config(job.teacher.model, job.teacher.shapes), jnp.dtype(job.teacher.dtype))


def student_shapes(job: Job, source: Model, rank: int | None = None) -> Model:
    """The student, with shapes for parameters.

    Args:
        source: so too.
        rank: what stands for ranks that follow from weights; None: they are refused.

    Raises:
        BadInput: a recipe, options or layers that do not go with the source.
    """
    from kvx.train.convert import names, recipe

    convert = job.convert
    if convert.recipe == NO_CONVERSION:
        if convert.options:
            raise BadInput(f"convert.options={dict(convert.options)!r} of recipe 'none'; allowed: none")
        if convert.layers != "all":
            raise BadInput(f"convert.layers={list(convert.layers)} of recipe 'none'; allowed: \"all\"")
        return source
    if convert.recipe not in names():
        raise unknown("convert.recipe", convert.recipe, (*names(), NO_CONVERSION))
    if not convert.layers:
        raise BadInput(f'convert.layers is empty; allowed: "all", or indices from 0 to {len(source.blocks) - 1}')
    try:
        return recipe(convert.recipe, **recipe_options(job)).shapes(source, rank)
    except BadInput as error:
        raise BadInput(f"convert: {error}") from None


def stand_in(job: Job) -> int | None:
    """For checks: the rank that the recipe is given, where each layer's own follows from its weights."""
    rank = job.convert.options.get("rank")
    return rank if type(rank) is int else None


def recipe_options(job: Job) -> dict[str, Any]:
    """What the recipe is called with: its options, and the layers where only some are converted."""
    layers = {} if job.convert.layers == "all" else {"layers": job.convert.layers}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in job.convert.options.items()}
    return {**options, **layers}


def model_config(model: str, shapes: str | None = None) -> Mapping[str, Any]:
    """The config.json of a model: that of its checkpoint, or the file named instead, which needs no checkpoint.

    Raises:
        BadInput: a file that cannot be read, a model that cannot be found.
    """
    if shapes is not None:
        try:
            found = json.loads(Path(shapes).read_text())
        except (OSError, ValueError) as error:
            raise BadInput(f"shapes={shapes!r} cannot be read: {error}; allowed: a config.json") from None
        if not isinstance(found, dict):
            raise BadInput(f"shapes={shapes!r} holds {str(found)[:40]!r}; allowed: a config.json, one object")
        return found
    from kvx.models.readers import read_checkpoint
    from kvx.models.zoo import resolve

    return read_checkpoint(resolve(model)).config


def check_config(shapes: str | None, model: str, own: Mapping[str, Any], name: str) -> None:
    """Refuse a config.json given for a model that is of another, where the model's own is at hand.

    Args:
        shapes: the file given; None: there is nothing to compare.
        own: the config of the model's checkpoint.
        name: of the setting.

    Raises:
        BadInput: the first of `TELLING` that both have and that differs.
    """
    if shapes is None:
        return
    given = model_config(model, shapes)
    for key in TELLING:
        if given.get(key) is not None and own.get(key) is not None and given[key] != own[key]:
            raise BadInput(f"{name}={shapes!r} has {key}={given[key]!r}; allowed: {own[key]!r}, as {model!r} itself")
