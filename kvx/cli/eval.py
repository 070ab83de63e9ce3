"""`kvx eval`: a grid of models, policies, tasks and lengths from a file, into records, a table and a report."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    config: Annotated[Path | None, typer.Argument(help="A TOML file, such as those in configs/eval/.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Another value: key.sub=value. May be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The results folder. Default: what the file says.")] = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="List the tasks and their options, and stop.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing: summary and report anew from what is there.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of a table.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables for a RESULTS file.")] = False,
) -> None:
    """Find out what policies cost: tasks with intervals, fidelity, bytes and time, resumable, with a report to look at.

    Each sample is written as soon as it is known: after an interruption the same command goes on where it stopped, and
    ends in the same table. Records, summary.csv and report.html go to the results folder.

    Examples:

        kvx eval configs/eval/smollm2_135m.toml

        kvx eval configs/eval/smollm2_135m.toml --set batch=8 --set tasks.0.samples=200 --out results/more

        kvx eval configs/eval/smollm2_135m.toml --report

        kvx eval --tasks
    """
    from dataclasses import replace

    from kvx.compilation_cache import enable_compilation_cache
    from kvx.errors import BadInput
    from kvx.eval.job import EvalJob
    from kvx.eval.results_folder import print_rows, write_summary
    from kvx.eval.run import run
    from kvx.eval.tasks.registry import print_tasks
    from kvx.section_file import read_section

    if tasks:
        print_tasks(as_json=json)
        return
    if config is None:
        raise BadInput("config is missing; allowed: a TOML file, such as those in configs/eval/ (see --help)")
    job = read_section(EvalJob, config, override or ())
    if out is not None:
        job = replace(job, output=str(out))
    if report:
        write_summary(Path(job.folder))
    else:
        enable_compilation_cache()
        run(job)
    print_rows(Path(job.folder), as_json=json, markdown=markdown)
