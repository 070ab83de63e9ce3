"""A job from start to end: load, convert, train its stages, judge, save. What `kvx distill` runs."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

import kvx
from kvx.mesh import on_host, place_model
from kvx.models.build import Model
from kvx.section_file import table_from
from kvx.train.interruption import Interruption
from kvx.train.job import Job
from kvx.train.job_checks import check_job
from kvx.train.judging import Verdict, judge
from kvx.train.loop import Trainer
from kvx.train.material import Material, read_material
from kvx.train.mesh import make_placement, row_share
from kvx.train.metrics import FILE, read
from kvx.train.objective import needs_teacher, objective
from kvx.train.parameters import Frame, cast, converted_layers
from kvx.train.run_folder import check_folder, claim, run_folder, saved_model, stage_folder
from kvx.train.start import KEY, start


@dataclass(frozen=True)
class Result:
    """What a job left.

    Attributes:
        name: of the job.
        folder: of the run.
        finished: False: told to stop before it was saved and judged; it waits to be resumed.
        conversion: `kvx.train.convert.report.Report.as_json`, which conversion.json in the folder holds too; None:
            nothing was converted.
        steps: taken, stage by stage.
        held_out: loss of the student before the first step and after the last, nats per token; empty: none was taken.
        teacher: its held-out loss.
        verdicts: of the trained model with its own cache, policy by policy.
        model: the folder that `kvx.load` reads, once finished.
    """

    name: str
    folder: str
    finished: bool
    conversion: Mapping[str, Any] | None
    steps: tuple[int, ...]
    held_out: tuple[float, ...] = ()
    teacher: float | None = None
    verdicts: tuple[Verdict, ...] = ()
    model: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=f"{self.name}: {self._end()}", title_justify="left")
        table.add_column("")
        table.add_column("", justify="right")
        if self.conversion is not None:
            before, after, dtype = (self.conversion[key] for key in ("before", "after", "dtype"))
            table.add_row(f"cache bytes a token, {dtype}", f"{after} of {before}, {after / before:.1%}")
        for name, loss in zip(("held-out perplexity at first", "at last"), self.held_out, strict=False):
            table.add_row(name, f"{math.exp(loss):.2f}")
        if self.teacher is not None:
            table.add_row("of the teacher", f"{math.exp(self.teacher):.2f}")
        for each in self.verdicts:
            passkey = "" if each.passkey is None else f", passkey {each.passkey:.0%}"
            table.add_row(f"decoding, {each.policy}", f"{each.perplexity:.2f}{passkey}, {each.cache_bytes} bytes")
        return table

    def _end(self) -> str:
        if not self.finished:
            return f"stopped after {self.steps[-1]} steps of stage {len(self.steps) - 1}; --resume goes on"
        return f"{' + '.join(map(str, self.steps))} steps, {self.model}"


def run_job(
    job: Job,
    *,
    resume: bool = False,
    seconds: float | None = None,
    console: Console | None = None,
) -> Result:
    """Run a job, or go on with it.

    What can be known before is checked before: the job, then its texts and the tokenizer, then weights are read.

    Args:
        resume: go on from the newest checkpoint, without converting again; stages that are over are only read.
        seconds: from this call on, after which training stops, for one process; None: never.
        console: of the progress; None: standard error.

    Raises:
        BadInput: a job that cannot run; a folder that holds another run, or this one without `resume`.
    """
    shown, stop = console or Console(stderr=True), Interruption(seconds)
    shapes = check_job(job)
    check_folder(job, resume)
    material = read_material(job, shapes)
    claim(job)
    # No device may be able to hold a whole model: what is placed on the mesh comes from the host.
    with on_host():
        source, _ = kvx.load(job.model, dtype=jnp.float32)
        student, facts = start(source, material, resume, shown)
        teacher = _teacher(job, source)
    folder, steps, stopped = run_folder(job), [], False
    with stop:
        for stage in range(len(job.stages)):
            trainer = _trainer(material, stage, student, teacher, facts, stop, shown)
            outcome = trainer.run(resume)
            student, stopped = outcome.student, outcome.stopped
            steps.append(outcome.step)
            if stopped:
                break
    held_out, guide = _losses(job)
    told = facts.get("conversion")
    if stopped:
        return Result(job.name, str(folder), False, told, tuple(steps), held_out, guide)
    student = gathered(student, job.saved_dtype)
    verdicts: tuple[Verdict, ...] = ()
    if jax.process_index() == 0:
        _save(student, material)
        verdicts = judge(on_devices(student), material, shown)
    return Result(job.name, str(folder), True, told, tuple(steps), held_out, guide, verdicts, str(saved_model(job)))


def gathered(student: Model, dtype: str) -> Model:
    """The whole model in the host's memory, parameters in another dtype; every process has to call it."""
    frame = Frame(student)
    arrays: dict[str, Any] = frame.arrays(student)
    if jax.process_count() > 1:
        arrays = {name: multihost_utils.process_allgather(array, tiled=True) for name, array in arrays.items()}
    whole = cast({name: np.asarray(array) for name, array in arrays.items()}, frame.parameters, jnp.dtype(dtype))
    with on_host():
        return frame.model(jax.tree.map(jnp.asarray, whole))


def on_devices(student: Model) -> Model:
    """The model on this process's own devices: whole on one; of several, each has a share of every layer."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return jax.device_put(student, devices[0])
    return place_model(student, Mesh(np.array(devices), ("tensor",)))


def _teacher(job: Job, source: Model) -> Model:
    if job.teacher.model in (None, job.model):
        return source
    return kvx.load(job.teacher.model, dtype=jnp.dtype(job.teacher.dtype))[0]


def _trainer(
    material: Material,
    index: int,
    student: Model,
    teacher: Model,
    facts: Mapping[str, Any],
    stop: Interruption,
    console: Console,
) -> Trainer:
    job, stage, placement = material.job, material.job.stages[index], make_placement(material.job.mesh)
    share, shares = row_share(placement)
    # Preferences are measured against the student as their stage begins.
    guide = None if not needs_teacher(stage) else student if stage.kind == "dpo" else teacher
    return Trainer(
        student,
        stage,
        objective(stage, placement),
        material.batches(index, share, shares),
        stage.total_steps(job.data.sequence),
        stage_folder(job, index),
        teacher=guide,
        teacher_dtype=job.teacher.dtype,
        held_out=material.judged(index, share, shares),
        passkeys=material.passkeys(index, share, shares),
        placement=placement,
        checkpoint=job.checkpoint,
        evaluate=job.evaluate,
        converted=converted_layers(student),
        facts={"job": table_from(job), "stage": index, KEY: facts},
        stop=stop,
        console=console,
    )


def _save(student: Model, material: Material) -> None:
    """Write the model, unless a run that was ended while it was judged has done so."""
    folder = saved_model(material.job)
    if not folder.exists():
        kvx.save(student, material.tokenizer, folder)


def _losses(job: Job) -> tuple[tuple[float, ...], float | None]:
    """Held-out loss of the student at first and at last, and of the teacher, from the stages' metrics."""
    files = [stage_folder(job, stage) / FILE for stage in range(len(job.stages))]
    lines = [line for file in files if file.exists() for line in read(file) if "held_out" in line]
    if not lines:
        return (), None
    return (lines[0]["held_out"], lines[-1]["held_out"]), lines[0].get("teacher_held_out")
