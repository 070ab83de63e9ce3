"""What a job's values mean for each other, its models, its data and its devices: checked before weights are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import kvx
from kvx.decoder import AttentionSpec
from kvx.errors import BadInput, unknown
from kvx.models.build import Model, abstract_model
from kvx.train.data.files import LINES, expand
from kvx.train.job import Job
from kvx.train.mesh import check_batch, make_placement
from kvx.train.shapes import model_config

NO_CONVERSION = "none"
"""The recipe that leaves the model as it is."""


def check_job(job: Job, *, here: bool = True) -> Model:
    """Refuse a job that cannot run, with one sentence; no weight is read and nothing is compiled.

    Args:
        here: it is to run on this machine's devices and files; False: only its models are checked, as ahead-of-time
            compilation needs them.

    Returns:
        The source model with shapes for parameters.

    Raises:
        BadInput: layers or widths that the source does not have, a teacher of another vocabulary, unknown recipes and
            policies, a batch that the mesh does not divide, paths that hold nothing, a run that is there already.
    """
    source = abstract_model(model_config(job.model, job.shapes), jnp.bfloat16)
    check_conversion(job, source)
    check_teacher(job, source)
    for text in job.evaluate.policies:
        kvx.parse_policy(text)
    if here:
        check_devices(job)
        check_paths(job)
    return source


def check_conversion(job: Job, source: Model) -> None:
    """The recipe is known and takes its options, which the source's heads and layers allow."""
    from kvx.train.convert import names, recipe

    convert = job.convert
    if convert.recipe == NO_CONVERSION:
        if convert.options:
            raise BadInput(f"convert.options={dict(convert.options)!r} of recipe 'none'; allowed: none")
        return
    if convert.recipe not in names():
        raise unknown("convert.recipe", convert.recipe, (*names(), NO_CONVERSION))
    recipe(convert.recipe, **recipe_options(job))  # refuses options that it does not take
    layers = len(source.blocks)
    if convert.layers != "all":
        if not convert.layers:
            raise BadInput(f'convert.layers is empty; allowed: "all", or indices from 0 to {layers - 1}')
        if (last := max(convert.layers)) >= layers:
            raise BadInput(
                f"convert.layers names layer {last}; allowed: 0 to {layers - 1}, the layers of {job.model!r}"
            )
    for layer in range(layers) if convert.layers == "all" else convert.layers:
        _check_widths(convert.options, source.blocks[layer].spec, source.embedding.table.shape[1])


def recipe_options(job: Job) -> dict[str, Any]:
    """What the recipe is called with: its options, and the layers where only some are converted."""
    layers = {} if job.convert.layers == "all" else {"layers": job.convert.layers}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in job.convert.options.items()}
    return {**options, **layers}


def check_teacher(job: Job, source: Model) -> None:
    """The teacher predicts the same tokens, and has the layers that are compared."""
    if job.teacher.model is None:
        return
    teacher = abstract_model(model_config(job.teacher.model, job.teacher.shapes), jnp.bfloat16)
    sizes = [model.embedding.table.shape[0] for model in (source, teacher)]
    if sizes[0] != sizes[1]:
        raise BadInput(
            f"teacher.model={job.teacher.model!r} has a vocabulary of {sizes[1]}; allowed: {sizes[0]}, the source's"
        )
    shapes = [(len(model.blocks), model.embedding.table.shape[1]) for model in (source, teacher)]
    for index, stage in enumerate(job.stages):
        if stage.loss.hidden and shapes[0] != shapes[1]:
            raise BadInput(
                f"stages.{index}.loss.hidden={stage.loss.hidden} with a teacher of {shapes[1][0]} layers of width "
                f"{shapes[1][1]}; allowed: 0, or a teacher of the source's {shapes[0][0]} of {shapes[0][1]}"
            )


def check_devices(job: Job) -> None:
    """The mesh makes up the devices and divides every stage's batch."""
    placement = make_placement(job.mesh)
    for index, stage in enumerate(job.stages):
        length = job.data.pairs.sequence if stage.kind == "dpo" else job.data.sequence
        try:
            check_batch(placement, stage.batch, stage.accumulate, length)
        except BadInput as error:
            raise BadInput(f"stages.{index}: {error}") from None


def check_paths(job: Job) -> None:
    """Every path of the data leads to files, held-out ones to others, and the run's folder can be written."""
    train: set[Path] = set()
    if any(stage.kind == "distill" for stage in job.stages):
        train = {file.resolve() for file in expand(job.data.train, "data.train")}
    if job.data.held_out:
        held_out = {file.resolve() for file in expand(job.data.held_out, "data.held_out")}
        if both := sorted(train & held_out):
            raise BadInput(f"data.held_out has {str(both[0])!r}, which is in data.train; allowed: other files")
    if any(stage.kind == "dpo" for stage in job.stages):
        expand(job.data.pairs.train, "data.pairs.train", LINES)
    if job.evaluate.passkey and not job.data.held_out:
        raise BadInput(f"evaluate.passkey={job.evaluate.passkey} without data.held_out; allowed: 0, or text to hide in")
    folder = Path(job.output or "").expanduser().absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise BadInput(f"output={job.output!r} lies below the file {str(nearest)!r}; allowed: a folder")


def _check_widths(options: Mapping[str, Any], spec: AttentionSpec, width: int) -> None:
    """Rank and rotary width fit into the heads of a layer."""
    if spec.latent:
        raise BadInput("the source has latent attention already; allowed: recipe 'none', or one of ordinary attention")
    heads = f"{spec.kv_heads} KV heads of {spec.key_dim} channels of keys and {spec.value_dim} of values"
    most = min(spec.kv_heads * (spec.key_dim + spec.value_dim), width)
    for name, high in (("rank", most), ("rotary", spec.kv_heads * spec.key_dim)):
        value = options.get(name)
        if isinstance(value, int) and not 1 <= value <= high:
            raise BadInput(f"convert.options.{name}={value}; allowed: 1 to {high}, for {heads} and width {width}")
