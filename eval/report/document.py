"""The page put together: a template, one style sheet, one script, the data, and a policy that lets nothing else in.

Its own few hundred lines draw it, since the whole of a plotting library (plotly: 4 MB) weighs more than most results
and would be mailed with every page. Whatever comes from results is escaped here, or reaches the page as text by script.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from kvx.errors import BadInput
from kvx.eval.report.findings import findings
from kvx.eval.report.payload import as_island, payload
from kvx.eval.report.study import Study

PAGE = "report.html"

STYLES = ("colours", "text", "controls", "figures", "media")

SCRIPTS = (
    "elements", "numbers", "scales", "marks", "tooltip", "placing", "legend", "axes", "frontier", "depths", "budgets",
    "strips", "layers", "prompt", "kept", "costs", "table", "start",
)  # fmt: skip
"""In the order in which the page reads them: every file uses only those before it."""

FEW = 12
"""Findings shown at once; more of them open on demand."""


ABOUT_FINDINGS = (
    "The smallest cache that is as good as the full one: its mean lies within the full cache's 95 % interval, or "
    "beyond its better end. Bytes are shares of a full cache in bfloat16."
)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its anchor, and what the script knows it by.
        title: its heading.
        about: how to read it.
    """

    name: str
    title: str
    about: str


FRONTIER = Section(
    "frontier",
    "Quality against bytes",
    "Each mark is a policy: how well it answers, against its resident cache as a share of a bfloat16 full cache. Up is "
    "better in every panel, left is smaller. The stepped line joins the policies that no other beats in both; thin "
    "lines join one method at several budgets. A double mark keeps more than it reads: filled at what is stored, open "
    "at what a step reads. The grey band is the full cache's interval; bars are 95 % intervals. Panels of one task "
    "share their scales.",
)
DEPTHS = Section(
    "depths",
    "By depth and length",
    "Mean score by where the answer lies in the text (its start on top) and by the length of the prompt. Dashed: no "
    "samples. The pointer shows the count and the 95 % interval of a box; few samples make wide ones.",
)
BUDGETS = Section(
    "budgets",
    "Budgets by layer and head",
    "Tokens kept of one prompt, by layer (left to right) and KV head (top to bottom), with the layer's total as bars "
    "above. Each map has its own scale, from nothing to its largest count, so that shapes compare; the numbers are "
    "below.",
)
KEPT = Section(
    "kept",
    "What is kept of a prompt",
    "The prompt from left to right, a strip a policy, shaded by the share of (layer, KV head) pairs that kept a token. "
    "Choose one: the image below shows it by layer, the first at the top, and the text by token; what none kept is "
    "grey. Choose a place in the image to read there.",
)
COSTS = Section(
    "costs",
    "Time and memory",
    "Medians on the machine that is named above, compilation excluded. Both axes are logarithmic: a slope is a power.",
)
TABLE = Section(
    "table",
    "All numbers",
    "Every policy in every combination of task, length and mode, with 95 % intervals. Differences are paired sample by "
    "sample with the full cache; bold ones exclude zero. A heading sorts.",
)


def write_report(folder: Path) -> Path:
    """Write report.html into a results folder.

    Args:
        folder: holds config.json and records.jsonl; kept.jsonl and costs.jsonl where there are any.

    Returns:
        Where the page lies.

    Raises:
        BadInput: files that are not what they should be, or a folder that cannot be written.
    """
    page = report(Study.of(folder))
    path, fresh = folder / PAGE, folder / f".{PAGE}.part"
    try:
        fresh.write_text(page, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise BadInput(f"{str(path)!r} cannot be written: {error.strerror or error}") from None
    return path


def report(study: Study) -> str:
    """The page as text: equal studies give equal pages, byte for byte."""
    data = payload(study)
    sections = _sections(data)
    page = files("kvx.eval.report") / "page"
    style = "\n".join((page / f"{name}.css").read_text("utf-8") for name in STYLES)
    script = "\n".join((page / f"{name}.js").read_text("utf-8") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{script}}})();\n'
    return Template((page / "page.html").read_text("utf-8")).substitute(
        security=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'",
        title=escape(study.name),
        summary=escape(_summary(study)),
        findings=_findings(study),
        config=_config(study.config),
        contents="".join(f'<li><a href="#{each.name}">{escape(each.title)}</a></li>' for each in sections),
        sections="".join(_section(each) for each in sections),
        style=style,
        data=as_island(data),
        script=script,
    )


def _sections(data: Mapping[str, Any]) -> list[Section]:
    """Those with something to show."""
    wanted = (
        (FRONTIER, data["rows"]),
        (DEPTHS, data["depths"]),
        (BUDGETS, data["kept"]["maps"]),
        (KEPT, data["kept"]["maps"]),
        (COSTS, data["costs"]),
        (TABLE, data["rows"]),
    )
    return [section for section, content in wanted if content]


def _section(section: Section) -> str:
    return (
        f'<section id="{section.name}" aria-labelledby="{section.name}-title">\n'
        f'<h2 id="{section.name}-title">{escape(section.title)}</h2>\n'
        f'<p class="about">{escape(section.about)}</p>\n<div class="figure"></div>\n</section>\n'
    )


def _summary(study: Study) -> str:
    rows = study.rows
    if not rows:
        return "Nothing has been answered yet."
    models, tasks = {row.cell.model for row in rows}, {row.cell.task for row in rows}
    lengths = sorted({row.cell.length for row in rows})
    span = f"{lengths[0]} tokens" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]} tokens"
    counts = (
        _count(len({row.policy for row in rows}), "policy", "policies"),
        _count(len(tasks), "task", "tasks"),
        _count(len(study.records), "answered sample", "answered samples"),
    )
    return f"{', '.join(sorted(models))}: {', '.join(counts)}, prompts of {span}."


def _findings(study: Study) -> str:
    found = findings(study.rows)
    if not found:
        return ""
    shown = _finding_list(found[:FEW])
    more = found[FEW:]
    if more:
        shown += f"<details><summary>{len(more)} more findings</summary>{_finding_list(more)}</details>"
    about = f'<p class="about">{escape(ABOUT_FINDINGS)}</p>'
    return (
        '<section id="findings" aria-labelledby="findings-title">\n'
        f'<h2 id="findings-title">Findings</h2>{about}{shown}</section>'
    )


def _finding_list(found: list[Any]) -> str:
    groups = groupby(found, key=lambda each: each.subject)
    subjects = "".join(
        f"<div><h3>{escape(subject)}</h3><ul>"
        + "".join(f"<li>{escape(each.sentence)}</li>" for each in group)
        + "</ul></div>"
        for subject, group in groups
    )
    return f'<div class="subjects">{subjects}</div>'


def _config(config: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in _flat(config)
    )
    return f'<details id="run"><summary>What was run</summary><table class="config">{rows}</table></details>'


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Tables within tables as dotted names; lists of plain values on one line."""
    if isinstance(value, Mapping):
        return [pair for key, each in value.items() for pair in _flat(each, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        return [pair for place, each in enumerate(value, 1) for pair in _flat(each, f"{name} {place}")]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)))]
    return [(name, str(value))]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _hash(text: str) -> str:
    """A source of a content security policy: this very text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
