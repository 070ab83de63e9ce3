"""An evaluation's results folder: whose it is, and the summary and the report made from its records alone."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from kvx.destinations import replace_file
from kvx.errors import BadInput
from kvx.eval.job import EvalJob
from kvx.eval.provenance import provenance
from kvx.eval.records import COSTS, KEPT, RECORDS, Record, read
from kvx.eval.summary import as_csv, as_markdown, summary, table
from kvx.prose import Prose
from kvx.section_file import table_from

CONFIG, SUMMARY, REPORT = "config.json", "summary.csv", "report.html"
LARGEST_CONFIG = 4_000_000
"""Bytes: a configuration is written by hand, and the report shows all of it."""
_FREE = ("output", "together")
"""Of a job, what no record depends on."""


def claim(job: EvalJob, prose: Prose, anew: bool = False) -> Path:
    """The folder of a job's results, new or begun earlier by the same job.

    Args:
        anew: an evaluation's results that are there are removed, whatever the job; so they are in any case where
            nothing was measured yet.

    Raises:
        BadInput: a path that cannot be written, other files, or the results of a job that differs.
    """
    folder = Path(job.folder)
    wanted = _identity(job, prose)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CONFIG).exists() and (
            anew or not any((folder / name).exists() for name in (RECORDS, KEPT, COSTS))
        ):
            results(folder)
            for name in (CONFIG, RECORDS, KEPT, COSTS, SUMMARY, REPORT):
                (folder / name).unlink(missing_ok=True)
        if (folder / CONFIG).exists():
            _check(folder, wanted)
        elif not anew and any(folder.iterdir()):
            raise BadInput(f"output={str(folder)!r} holds files of something else; allowed: a new or an empty folder")
        else:
            replace_file(folder / CONFIG, (json.dumps({**wanted, **provenance()}, indent=2) + "\n").encode())
    except OSError as error:
        raise BadInput(f"output={str(folder)!r} cannot be written: {error.strerror or error}") from None
    return folder


def results(folder: Path) -> dict[str, Any]:
    """What made a folder's results, if that is what it holds.

    Raises:
        BadInput: something else, or nothing.
    """
    found = config(folder)
    if not {"models", "tasks", "prose"} <= found.keys():
        raise BadInput(f"output={str(folder)!r} holds files of something else; allowed: a new or an empty folder")
    return found


def config(folder: Path) -> dict[str, Any]:
    """What made a folder's results: the job, field by field, its prose, and where it ran.

    Raises:
        BadInput: a folder without results, or a file that is not what `claim` writes.
    """
    path = folder / CONFIG
    try:
        if (size := path.stat().st_size) > LARGEST_CONFIG:
            raise BadInput(f"{str(path)!r} has {size} bytes; allowed: at most {LARGEST_CONFIG}")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{str(path)!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{str(path)!r} holds a {type(found).__name__}; allowed: a table")
    return found


def write_summary(folder: Path) -> None:
    """The table as CSV, and the report, from the records alone.

    Raises:
        BadInput: a folder that holds no results.
    """
    from kvx.eval.report import write_report

    results(folder)
    replace_file(folder / SUMMARY, as_csv(summary(read(folder / RECORDS, Record))).encode())
    write_report(folder)


def print_rows(folder: Path, as_json: bool = False, markdown: bool = False) -> None:
    """The table of a folder's records, its rows as JSON, or what a RESULTS file wants, on standard output."""
    rows = summary(read(folder / RECORDS, Record))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    if markdown:
        print(as_markdown(rows), end="")
        return
    # A table in a file or a pipe should not be cut to the width of a terminal that is not there.
    Console(width=None if Console().is_terminal else 230).print(table(rows))
    print(f"report: {folder / REPORT}")


def _identity(job: EvalJob, prose: Prose) -> dict[str, Any]:
    """What two runs must share for their records to belong together; as JSON gives it back."""
    table = {key: value for key, value in table_from(job).items() if key not in _FREE}
    return json.loads(json.dumps({**table, "prose": {"name": prose.name, "sha256": prose.sha256}}))


def _check(folder: Path, wanted: dict[str, Any]) -> None:
    found = config(folder)
    keys = wanted.keys() | {field.name for field in fields(EvalJob)} - set(_FREE)
    if differing := sorted(key for key in keys if found.get(key) != wanted.get(key)):
        raise BadInput(
            f"output={str(folder)!r} holds the results of a job with other {', '.join(differing)}; allowed: that job, "
            "or another folder"
        )
