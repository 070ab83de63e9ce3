"""`kvx distill`: convert a model's attention and train it against its teacher, as a job file says."""

from pathlib import Path
from typing import Annotated

import typer


def distill(
    config: Annotated[Path, typer.Argument(help="A job: a TOML file, such as those in configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value: values that replace the file's; stages.0.steps=100.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    aot: Annotated[
        str | None, typer.Option(help="Compile the step for such a TPU pod (v5e:16x16), print what it takes, and end.")
    ] = None,
    stage: Annotated[int, typer.Option(help="Which stage --aot compiles.", min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and end.")] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Stop training after so long; --resume goes on. For one process.", min=0)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Distil a model into one with a smaller cache: convert, train, judge, save.

    The run's folder holds metrics, checkpoints, and at the end `model/`, which every kvx command takes. SIGTERM writes
    a checkpoint and ends. Several machines: set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Examples:

        kvx distill configs/xecomla_smollm2_135m.toml

        kvx distill configs/xecomla_smollm2_135m.toml convert.options.rank=64 stages.0.tokens=1000000 output=runs/r64

        kvx distill configs/xecomla_smollm2_135m.toml --resume

        kvx distill configs/xecomla_llama32_1b.toml --aot v5e:16x16
    """
    from kvx.compilation_cache import enable_compilation_cache
    from kvx.errors import BadInput
    from kvx.train.job_file import read_job

    job = read_job(config, overrides or ())
    if stage >= len(job.stages):
        raise BadInput(f"--stage {stage}; allowed: 0 to {len(job.stages) - 1}, the stages of {str(config)!r}")
    if aot is not None:
        from kvx.train.aot import compile_job
        from kvx.train.job_checks import check_job

        check_job(job, here=False)
        _print(compile_job(job, aot, stage), json)
        return
    from kvx.train.plan import plan_job
    from kvx.train.processes import join_processes
    from kvx.train.run import run_job

    join_processes()
    if dry_run:
        _print(plan_job(job, resume), json)
        return
    enable_compilation_cache()
    _print(run_job(job, resume=resume, seconds=seconds), json)


def _print(found: object, as_json: bool) -> None:
    """What was found, as its table or as JSON; one process of several prints."""
    import jax

    if jax.process_index() != 0:
        return
    if as_json:
        from json import dumps

        print(dumps(found.as_json(), indent=2))  # type: ignore[attr-defined]
        return
    from rich.console import Console

    Console().print(found.table())  # type: ignore[attr-defined]
