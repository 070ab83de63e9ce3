"""What a search leaves behind: the frontier as a table, as JSON, and as a configuration that `kvx eval` takes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from rich.table import Table

from kvx.errors import BadInput
from kvx.eval.job import FULL, EvalJob
from kvx.eval.provenance import provenance
from kvx.eval.records import Record
from kvx.eval.search.job import SearchJob
from kvx.eval.search.loop import Found
from kvx.eval.statistics import Interval
from kvx.eval.summary import Row, summary
from kvx.section_file import table_from


def rows_of(found: Found, records: Sequence[Record]) -> dict[str, Row]:
    """The summary of the full cache and of every policy that was run on all samples, by its text."""
    shown = {FULL, *(point.name for point in found.finalists)}
    return {row.policy: row for row in summary([record for record in records if record.policy in shown])}


def table(found: Found, rows: Mapping[str, Row]) -> Table:
    """The frontier, the full cache first."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("policy", overflow="fold")
    for column in ("bytes a token", "of bf16", "score (95 %)", "minus full (paired)"):
        shown.add_column(column, justify="right", no_wrap=True)
    for text in dict.fromkeys([FULL, *(point.name for point in reversed(found.frontier))]):
        row = rows[text]
        difference = "" if row.difference is None else _interval(row.difference)
        shown.add_row(text, f"{found.sized[text]:.0f}", f"{row.share:.1%}", _interval(row.score), difference)
    return shown


def told(found: Found) -> list[str]:
    """What else there is to say, in sentences."""
    refused = sum(isinstance(size, BadInput) for size in found.sized.values())
    looked = len(found.sized)
    lines = [
        f"{looked} policies were looked at: {refused} cannot be, {looked - refused - len(found.fitting)} exceed "
        f"{found.limit:g} bytes a token, {len(found.run)} were run, {len(found.finalists)} of them on all "
        f"{found.counts[-1]} samples."
    ]
    return lines + [f"Left out: {reason}" for _, reason in sorted(found.left_out.items())]


def as_json(job: SearchJob, found: Found, rows: Mapping[str, Row]) -> str:
    """Everything, with what is needed to repeat it."""
    edge = [point.name for point in found.frontier]
    content = {
        "job": table_from(job),
        **provenance(),
        "rungs": found.counts,
        "full": _policy(FULL, found, rows),
        "frontier": [_policy(text, found, rows) for text in edge],
        "run": [_policy(text, found, rows) for text in found.run],
        "too_large": {
            text: size
            for text, size in found.sized.items()
            if not isinstance(size, BadInput) and text not in found.fitting
        },
        "refused": {text: str(size) for text, size in found.sized.items() if isinstance(size, BadInput)},
        "left_out": dict(found.left_out),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_config(job: SearchJob, found: Found) -> str:
    """TOML of an evaluation of the frontier on the same samples."""
    policies = [point.name for point in found.frontier if point.name != FULL]
    chosen = replace(job.evaluation(policies), name=f"{job.task}_frontier", output=None)
    head = (
        f"# The frontier of a search on {job.task} at {job.length} tokens, at most {found.limit:g} bytes a token.\n"
        f"#   kvx eval frontier.toml\n\n"
    )
    return head + _toml(chosen)


def _policy(text: str, found: Found, rows: Mapping[str, Row]) -> dict[str, Any]:
    scores = found.scores[text]
    content = {
        "policy": text,
        "bytes_per_token": found.sized[text],
        "samples": len(scores),
        "quality": sum(scores) / len(scores),
    }
    if text in rows:
        row = rows[text]
        content |= {
            "score": asdict(row.score),
            "minus_full": None if row.difference is None else asdict(row.difference),
            "share_of_bf16": row.share,
        }
    return content


def _toml(job: EvalJob) -> str:
    """What differs from the defaults: plain values first, its own before `Conditions`; then sections, then lists."""
    values = table_from(job)
    own_first = sorted(fields(job), key=lambda each: bool(each.kw_only))
    given = {each.name: values[each.name] for each in own_first if getattr(job, each.name) != each.default}
    lines = [f"{key} = {_value(value)}" for key, value in given.items() if not _is_section(value)]
    for key, value in given.items():
        if _is_section(value):
            many = isinstance(value, list)
            for section in value if many else [value]:
                lines += ["", f"[[{key}]]" if many else f"[{key}]"]
                lines += [f"{name} = {_value(each)}" for name, each in section.items() if each != {}]
    return "\n".join(lines) + "\n"


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _value(value: Any) -> str:
    """A value in TOML: its strings, numbers and truth values are JSON's, its inline tables are not."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        if len(value) > 1 and all(isinstance(each, str) for each in value):
            return "[\n" + "".join(f"    {_value(each)},\n" for each in value) + "]"
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _interval(value: Interval) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
