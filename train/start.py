"""The student as a run begins: converted from its source, or, where checkpoints hold its weights, only its shapes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from kvx.models.build import Model, abstract_model, config_from_model
from kvx.train.convert import Report, convert, measure_moments, recipe
from kvx.train.job_checks import NO_CONVERSION, recipe_options
from kvx.train.material import Material

FILE = "start.json"
"""In a run's folder: the student's config, whose widths may follow from weights and texts, and its report's sums."""

Sizes = tuple[int | None, int | None]
"""Cache bytes for each token, of the source and of the student; None: nothing was converted."""


def begin(source: Model, material: Material, folder: Path, console: Console) -> tuple[Model, Sizes]:
    """Convert, say what was done, and keep in the run's folder what a resumed run needs to know of it.

    Args:
        source: in float32.
        folder: of the run.
    """
    student, report = converted(source, material)
    sizes: Sizes = (None, None) if report is None else (report.before, report.after)
    if jax.process_index() == 0:
        if report is not None:
            console.print(report)
        partial = folder / f"{FILE}.partial"
        partial.write_text(json.dumps({"config": config_from_model(student), "sizes": sizes}))
        partial.rename(folder / FILE)
    return student, sizes


def begun(folder: Path) -> tuple[Model, Sizes]:
    """What `begin` left, with shapes for parameters: for a run whose checkpoints hold every weight."""
    kept = json.loads((folder / FILE).read_text())
    return abstract_model(kept["config"], jnp.float32), tuple(kept["sizes"])


def converted(source: Model, material: Material) -> tuple[Model, Report | None]:
    """The student before its training, and what its conversion did."""
    job = material.job
    if job.convert.recipe == NO_CONVERSION:
        return source, None
    chosen = recipe(job.convert.recipe, **recipe_options(job))
    moments = measure_moments(source, material.calibration()) if chosen.reads_text else None
    return convert(source, chosen, moments)
