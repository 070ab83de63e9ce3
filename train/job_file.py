"""Job files: the job that a TOML file describes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvx.section_file import read_section
from kvx.train.job import Job


def read_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """The job that a file describes, each value checked for itself.

    Args:
        path, overrides: of `kvx.section_file.read_section`.

    Returns:
        The job; paths are relative to where kvx runs, but `shapes` to the file's folder. `kvx.train.job_checks` checks
        what the values mean for each other, for the model and for the data.

    Raises:
        BadInput: see `read_section`.
    """
    job = read_section(Job, path, overrides)
    here, teacher = path.parent, job.teacher
    if job.shapes is not None:
        job = replace(job, shapes=str(here / job.shapes))
    if teacher.shapes is not None:
        job = replace(job, teacher=replace(teacher, shapes=str(here / teacher.shapes)))
    return job
