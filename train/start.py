"""The student as a run begins: converted from its source, or, where checkpoints hold its weights, only its shapes."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from kvx.destinations import replace_file
from kvx.models.build import Model, abstract_model, config_from_model
from kvx.train.checkpoints import Checkpoints
from kvx.train.convert import Report, convert, measure_moments, recipe
from kvx.train.material import Material
from kvx.train.run_folder import run_folder, stage_folder
from kvx.train.shapes import NO_CONVERSION, recipe_options

FILE = "conversion.json"
"""The report of the conversion, in the run's folder."""

KEY = "start"
"""Of a checkpoint's facts: what the student is, whose widths may follow from weights and texts."""


def start(source: Model, material: Material, resume: bool, console: Console) -> tuple[Model, dict[str, Any]]:
    """The student, and what every checkpoint is to say of it.

    A run that goes on does not convert again: the checkpoints of its first stage hold every weight. Preferences alone
    need the student as their stage began, too.

    Args:
        source: in float32.
        resume: from the first stage's checkpoints, if there are any.
    """
    job = material.job
    if resume and job.stages[0].kind != "dpo":
        facts = Checkpoints(stage_folder(job, 0) / "checkpoints").facts()
        if facts is not None and KEY in facts:
            return abstract_model(facts[KEY]["config"], jnp.float32), facts[KEY]
    student, report = converted(source, material)
    told = None if report is None else report.as_json()
    if report is not None and jax.process_index() == 0:
        console.print(report)
        replace_file(run_folder(job) / FILE, json.dumps(told, indent=2).encode())
    return student, {"config": config_from_model(student), "conversion": told}


def converted(source: Model, material: Material) -> tuple[Model, Report | None]:
    """The student before its training, and what its conversion did, in bytes of the model that will be saved."""
    job = material.job
    if job.convert.recipe == NO_CONVERSION:
        return source, None
    chosen = recipe(job.convert.recipe, **recipe_options(job))
    # The source lies in the host's memory; the arithmetic over texts is for what is fast.
    device = jax.local_devices()[0]
    moments = measure_moments(source, material.calibration(), device=device) if chosen.reads_text else None
    student, report = convert(source, chosen, moments)
    return student, replace(report, dtype=job.saved_dtype)
