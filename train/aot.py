"""The training step of a job compiled for a TPU pod without one: what a chip holds, what crosses between chips.

No weight is loaded and none exists: both models are shapes. The compiler is the real one (libtpu), so what it reports
is what a pod would run.
"""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from kvx.errors import BadInput, unknown
from kvx.kernels.implementations import compiling_for
from kvx.train.batch import Batch, Pairs
from kvx.train.collectives import Traffic, traffic
from kvx.train.job import Job
from kvx.train.mesh import check_batch, make_placement
from kvx.train.objective import needs_teacher, objective
from kvx.train.parameters import Frame, converted_layers
from kvx.train.shapes import model_shapes
from kvx.train.step import Step

GIB = 2**30
MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
"""GiB of a chip, by the beginning of a topology's name (Google Cloud's documentation)."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of one stage's step.

    Attributes:
        topology, chips: as "v5e:16x16", 256.
        mesh: devices along each axis.
        arguments, outputs, aliased, temporaries: bytes on a chip; aliased ones are outputs in the place of arguments.
        collectives: by kind, of one step on one chip.
        memory: bytes that a chip has.
        seconds: that the compiler took.
        refusal: the compiler's own words if the program does not fit; the bytes are then 0.
    """

    topology: str
    chips: int
    mesh: Mapping[str, int]
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    collectives: Mapping[str, Traffic]
    memory: int
    seconds: float
    refusal: str | None = None

    @property
    def needed(self) -> int:
        """Bytes of a chip that are in use at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the step runs on such a chip."""
        return self.refusal is None and self.needed <= self.memory

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"needed": self.needed, "fits": self.fits}

    def table(self) -> Table:
        """For the terminal."""
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1)
        table = Table(title=f"{self.topology}: {self.chips} chips, {axes or 'one device'}", title_justify="left")
        table.add_column("on each chip")
        table.add_column("", justify="right")
        if self.refusal is not None:
            table.add_row("does not fit", self.refusal)
            return table
        for name in ("arguments", "outputs", "aliased", "temporaries"):
            table.add_row(name, f"{getattr(self, name) / GIB:.3f} GiB")
        verdict = "fits" if self.fits else "does not fit"
        table.add_row(verdict, f"{self.needed / GIB:.3f} of {self.memory / GIB:.0f} GiB")
        for kind, found in self.collectives.items():
            table.add_row(f"{found.count} x {kind}", f"{found.bytes / GIB:.3f} GiB")
        table.add_row("compiled in", f"{self.seconds:.0f} s")
        return table


def compile_job(job: Job, topology: str, stage: int = 0) -> Compiled:
    """Compile a stage's step.

    Args:
        topology: "v5e:16x16", "v5p:4x4x8", ...: chip and shape, as the TPU compiler names them.
        stage: which of the job's.

    Raises:
        BadInput: a topology that is not known, a mesh that does not make it up, a batch that the mesh does not divide,
            a conversion whose ranks follow from weights, or no TPU compiler.
    """
    section = job.stages[stage]
    prefers = section.kind == "dpo"
    memory = _memory(topology)
    chips = _chips(topology)
    placement = make_placement(job.mesh, chips)
    length = job.data.pairs.sequence if prefers else job.data.sequence
    check_batch(placement, section.batch, section.accumulate, length)
    student, teacher = model_shapes(job)
    if prefers:
        teacher = student  # as the stage begins
    frame, guide = Frame(student), Frame(teacher) if needs_teacher(section) else None
    names = frame.chosen(section.train, converted_layers(student))
    total = section.total_steps(job.data.sequence)
    step = Step(frame, names, section, total, objective(section, placement), placement, guide)
    state, frozen = step.begin(_shapes(frame.arrays(student)))
    beside = None if guide is None else guide.placed(placement, _shapes(guide.arrays(teacher)))
    whole = jax.ShapeDtypeStruct((section.batch, length), jnp.int32)
    ids = placement.put(whole, ("rows", "sequence"))
    mask = jax.ShapeDtypeStruct(ids.shape, jnp.bool_, sharding=ids.sharding)
    text = Batch(ids, ids, ids, mask)
    batch = Pairs(text, text) if prefers else text
    mesh = dict(placement.mesh.shape)
    begin = time.perf_counter()
    try:
        with compiling_for("tpu"):
            lowered = step.jitted.lower(state, frozen, beside, batch)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - begin
        return Compiled(topology, len(chips), mesh, 0, 0, 0, 0, {}, memory, seconds, _first_sentence(str(error)))
    sizes = compiled.memory_analysis()
    return Compiled(
        topology,
        len(chips),
        mesh,
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes,
        sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        traffic(compiled.as_text()),
        memory,
        time.perf_counter() - begin,
    )


def _memory(topology: str) -> int:
    chip, _, shape = topology.partition(":")
    if chip not in MEMORY:
        raise unknown("chip", chip, MEMORY)
    if not re.fullmatch(r"\d+(x\d+)+", shape):
        raise BadInput(f"topology={topology!r}; allowed: chip:shape, as v5e:16x16 or v5p:4x4x8")
    return MEMORY[chip] * GIB


def _chips(topology: str) -> list[Any]:
    # Without it libtpu asks a cloud's metadata server who this machine is.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except (ModuleNotFoundError, jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise BadInput(
            f"topology={topology!r}: {_first_sentence(str(error))}; allowed: one that libtpu knows "
            "(pip install kvx[aot]), while no other process uses it"
        ) from None


def _shapes(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Constants of a model of shapes are arrays, which a machine without the chips cannot place."""
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


def _first_sentence(text: str) -> str:
    return " ".join(text.split())[:300]
