"""A run's folder: whose it is, and what a run that goes on may change."""

import json
from pathlib import Path
from typing import Any

import jax

from kvx.destinations import make_folder, replace_file
from kvx.errors import BadInput
from kvx.section_file import table_from
from kvx.train.begun import check_begun
from kvx.train.job import Job
from kvx.train.processes import agreed, meet

FILE = "job.json"
"""The job as it ran, in its folder."""

RESUMABLE = ("mesh", "checkpoint", "evaluate")
"""Sections that a resumed run may change: where it runs and what is written, not what is computed."""

GENTLER = "learning_rate"
"""Of a stage, which a resumed run may change too: a run that diverged goes on with a lower one."""


def run_folder(job: Job) -> Path:
    """Where a job keeps all that it writes."""
    return Path(str(job.output)).expanduser()


def stage_folder(job: Job, stage: int) -> Path:
    """Where a stage keeps its metrics and checkpoints."""
    return run_folder(job) / f"stage-{stage}-{job.stages[stage].kind}"


def saved_model(job: Job) -> Path:
    """Where a job that is over keeps its student, as `kvx.load` reads it."""
    return run_folder(job) / "model"


def check_folder(job: Job, resume: bool) -> None:
    """Refuse a folder that holds another run; to be asked by all processes, before anything is read or written.

    Raises:
        BadInput: a model that no run left; a run without `resume`, or the other way round; another job than the one
            that is resumed, by the first key that differs; a damaged record of it.
    """
    agreed(lambda: _check(job, resume), f"output={job.output!r} is refused, as the first process says")


def claim(job: Job) -> None:
    """Keep the job beside its run, in the place of what was kept before, whole or not at all."""
    if jax.process_index() == 0:
        folder = run_folder(job)
        make_folder(folder, "output")
        replace_file(folder / FILE, json.dumps(table_from(job), indent=2).encode())
    meet("the folder is claimed")


def _check(job: Job, resume: bool) -> int:
    kept, model = run_folder(job) / FILE, saved_model(job)
    if not kept.exists():
        if model.exists():
            raise BadInput(f"output={job.output!r} holds {model.name}/ of no run; allowed: another folder")
        if resume:
            raise BadInput(f"output={job.output!r} holds no run; allowed: no --resume, or the folder of a run")
        return 0
    if not resume:
        raise BadInput(f"output={job.output!r} holds a run; allowed: --resume, or another folder")
    rest = f"changes of {', '.join(RESUMABLE)} and of a stage's {GENTLER}, or another folder"
    check_begun(kept, table_from(job), f"the run in {job.output!r}", rest, _fixed)
    return 0


def _fixed(table: dict[str, Any]) -> dict[str, Any]:
    """What of a job must stay: `output` may be another name of the same folder."""
    kept = {key: value for key, value in table.items() if key not in (*RESUMABLE, "output")}
    stages = [{key: value for key, value in stage.items() if key != GENTLER} for stage in table["stages"]]
    return {**kept, "stages": stages}
