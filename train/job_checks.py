"""What a job's values mean for each other, its models, its data and its devices: checked before weights are read."""

from pathlib import Path

import jax.numpy as jnp

import kvx
from kvx.errors import BadInput
from kvx.models.build import Model, abstract_model
from kvx.train.data.files import expand
from kvx.train.data.pairs import PREFERENCES
from kvx.train.job import EvaluateSection, Job
from kvx.train.mesh import check_batch, make_placement
from kvx.train.metrics import check_tensorboard
from kvx.train.optimizer import steps_of
from kvx.train.parameters import Frame, converted_layers
from kvx.train.shapes import NO_CONVERSION, model_config, recipe_options, stand_in, student_shapes


def check_job(job: Job, *, here: bool = True) -> Model:
    """Refuse a job that cannot run, with one sentence; no weight is read and nothing is compiled.

    Args:
        here: it is to run on this machine's devices and files; False: only its models are checked, as ahead-of-time
            compilation needs them.

    Returns:
        The source model with shapes for parameters.

    Raises:
        BadInput: layers or widths that the source does not have, a teacher of another vocabulary, rows beyond the
            model's positions, a learning rate that never gets to its peak, unknown recipes and policies, a batch that
            the mesh does not divide, paths that hold nothing, a package that is missing.
    """
    source = abstract_model(model_config(job.model, job.shapes), jnp.bfloat16)
    student = student_shapes(job, source, stand_in(job))
    check_trained(job, student)
    check_teacher(job, source, student)
    check_lengths(job, source)
    check_schedules(job)
    for text in job.evaluate.policies:
        kvx.parse_policy(text).check([block.spec for block in student.blocks])
    if here:
        check_tensorboard()
        check_devices(job)
        check_paths(job)
    return source


def check_lengths(job: Job, source: Model) -> None:
    """What is trained, calibrated and judged by has positions that the model was made for."""
    lengths = {"data.sequence": job.data.sequence}
    if any(stage.kind == "dpo" for stage in job.stages):
        lengths["data.pairs.sequence"] = job.data.pairs.sequence
    if job.evaluate.passkey:
        lengths["evaluate.passkey_length"] = job.evaluate.passkey_length
    for name, length in lengths.items():
        if length > source.max_positions:
            raise BadInput(f"{name}={length}; allowed: at most {source.max_positions}, the model's positions")


def check_schedules(job: Job) -> None:
    """Every stage's learning rate reaches its peak: what leads up to it, and from it, takes no more than its steps."""
    for index, stage in enumerate(job.stages):
        total = stage.total_steps(job.data.sequence)
        names = ("warmup", "decay") if stage.schedule == "wsd" else ("warmup",)
        # Shares of all steps may come to one more, each rounded for itself; the peak is reached then, too.
        if sum(steps_of(getattr(stage, name), total) for name in names) > total + len(names) - 1:
            given = " and ".join(f"{name}={getattr(stage, name)}" for name in names)
            raise BadInput(f"stages.{index}.{given} of {total} steps; allowed: at most {total} steps in all")


def check_trained(job: Job, student: Model) -> None:
    """Every stage trains something."""
    converted = converted_layers(student)
    for index, stage in enumerate(job.stages):
        try:
            Frame(student).chosen(stage.train, converted)
        except BadInput as error:
            raise BadInput(f"stages.{index}: {error}") from None


def check_teacher(job: Job, source: Model, student: Model) -> None:
    """The teacher predicts the same tokens, and has the layers and heads that are compared."""
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
        if stage.loss.relation:
            check_relation(index, stage.loss.relation, student, teacher)


def check_relation(index: int, weight: float, student: Model, teacher: Model) -> None:
    """The last layers' heads can be compared: one side's, repeated, are as many as the other's."""
    mine, theirs = (model.blocks[-1].expanded.spec for model in (student, teacher))
    for name in ("heads", "kv_heads"):
        few, many = sorted((getattr(mine, name), getattr(theirs, name)))
        if many % few:
            raise BadInput(
                f"stages.{index}.loss.relation={weight} between {getattr(mine, name)} and {getattr(theirs, name)} "
                f"{name}; allowed: 0, or a teacher of which one number divides the other"
            )


def reads_text(job: Job) -> bool:
    """Whether the conversion is calibrated on the training text."""
    from kvx.train.convert import recipe

    return job.convert.recipe != NO_CONVERSION and recipe(job.convert.recipe, **recipe_options(job)).reads_text


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
    if reads_text(job) or any(stage.kind == "distill" for stage in job.stages):
        train = {file.resolve() for file in expand(job.data.train, "data.train")}
    if job.data.held_out:
        held_out = {file.resolve() for file in expand(job.data.held_out, "data.held_out")}
        if both := sorted(train & held_out):
            raise BadInput(f"data.held_out has {str(both[0])!r}, which is in data.train; allowed: other files")
    if any(stage.kind == "dpo" for stage in job.stages):
        expand(job.data.pairs.train, "data.pairs.train", PREFERENCES)
    if job.evaluate.passkey and not job.data.held_out:
        raise BadInput(f"evaluate.passkey={job.evaluate.passkey} without data.held_out; allowed: 0, or text to hide in")
    if job.evaluate.policies not in ((), EvaluateSection().policies) and not job.data.held_out:
        raise BadInput(
            f"evaluate.policies={list(job.evaluate.policies)} without data.held_out; allowed: none, or text to judge by"
        )
    folder = Path(job.output or "").expanduser().absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise BadInput(f"output={job.output!r} lies below the file {str(nearest)!r}; allowed: a folder")
