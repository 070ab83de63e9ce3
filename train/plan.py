"""What a job would do, known without weights: its conversion, its stages, its text. What `--dry-run` prints."""

from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
from rich.table import Table

from kvx.errors import BadInput
from kvx.models.build import Model
from kvx.train.convert.report import cached_elements
from kvx.train.job import Job
from kvx.train.job_checks import check_job
from kvx.train.material import read_material
from kvx.train.mesh import make_placement
from kvx.train.parameters import converted_layers
from kvx.train.run_folder import check_folder
from kvx.train.shapes import stand_in, student_shapes


@dataclass(frozen=True)
class PlannedStage:
    """One stage: its kind, optimizer steps, tokens in all, tokens of a step, and epochs of its text where known."""

    kind: str
    steps: int
    tokens: int
    tokens_of_a_step: int
    epochs: float | None


@dataclass(frozen=True)
class Plan:
    """A job that was checked.

    Attributes:
        name, model, teacher, recipe: as the job has them.
        layers: those with latent attention once converted.
        dtype: of the saved model, hence of what its cache holds.
        before, after: cache bytes for each token in that dtype, of the source's attention and of the student's; None:
            ranks that follow from weights.
        output: folder of the run.
        mesh: devices along each axis.
        documents, held_out, pairs: how many there are.
        tokens: of the documents; None: more text than is made into tokens for a plan.
        stages: in order.
    """

    name: str
    model: str
    teacher: str
    recipe: str
    layers: tuple[int, ...]
    dtype: str
    before: int
    after: int | None
    output: str
    mesh: dict[str, int]
    documents: int
    held_out: int
    pairs: int
    tokens: int | None
    stages: tuple[PlannedStage, ...]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=self.name, title_justify="left", show_header=False)
        table.add_row("model", f"{self.model}, taught by {self.teacher}")
        table.add_row("conversion", self.recipe)
        after = "as the ranks will be" if self.after is None else f"{self.after:,} ({self.after / self.before:.1%})"
        table.add_row("latent attention", f"{len(self.layers)} layers")
        table.add_row(f"cache bytes a token, {self.dtype}", f"{self.before:,} before, {after} after")
        known = "too much text to count tokens" if self.tokens is None else f"{self.tokens:,} tokens"
        text = f"{self.documents:,} documents ({known}), {self.held_out:,} held out, {self.pairs:,} pairs"
        table.add_row("text", text)
        for index, stage in enumerate(self.stages):
            steps = f"{stage.steps:,} steps of {stage.tokens_of_a_step:,} tokens, {stage.tokens:,} in all"
            steps += "" if stage.epochs is None else f", {stage.epochs:,.2f} epochs"
            table.add_row(f"stage {index}, {stage.kind}", steps)
        table.add_row("mesh", " x ".join(f"{axis} {size}" for axis, size in self.mesh.items()))
        table.add_row("output", self.output)
        return table


def plan_job(job: Job, resume: bool = False) -> Plan:
    """Check a job as a run would, reading everything but weights.

    Raises:
        BadInput: as `kvx.train.run.run_job`.
    """
    source = check_job(job)
    check_folder(job, resume)
    material = read_material(job, source)
    tokens = material.tokens()
    student = student_shapes(job, source, stand_in(job))
    try:
        after = cache_bytes(student_shapes(job, source), job.saved_dtype)
    except BadInput:
        after = None
    options = ", ".join(f"{name}={value}" for name, value in job.convert.options.items())
    return Plan(
        name=job.name,
        model=job.model,
        teacher=job.teacher.model or job.model,
        recipe=f"{job.convert.recipe}({options})",
        layers=converted_layers(student) or (),
        dtype=job.saved_dtype,
        before=cache_bytes(source, job.saved_dtype),
        after=after,
        output=str(job.output),
        mesh=dict(make_placement(job.mesh).mesh.shape),
        documents=len(material.train),
        held_out=len(material.held_out),
        pairs=len(material.pairs),
        tokens=tokens,
        stages=tuple(_planned(job, index, tokens, len(material.pairs)) for index in range(len(job.stages))),
    )


def cache_bytes(model: Model, dtype: str) -> int:
    """What a token takes in the cache of all layers, by shapes alone."""
    return jnp.dtype(dtype).itemsize * sum(cached_elements(model, layer) for layer in range(len(model.blocks)))


def _planned(job: Job, index: int, tokens: int | None, pairs: int) -> PlannedStage:
    stage = job.stages[index]
    row = job.data.sequence if stage.kind == "distill" else 2 * job.data.pairs.sequence
    steps = stage.total_steps(job.data.sequence)
    read, there = (steps * stage.batch, pairs) if stage.kind == "dpo" else (steps * stage.batch * row, tokens)
    epochs = read / there if there else None
    return PlannedStage(stage.kind, steps, steps * stage.batch * row, stage.batch * row, epochs)
