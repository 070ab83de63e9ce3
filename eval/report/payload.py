"""The page's data: what its script draws, as one table of JSON with everything named once and numbers of six digits."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvx.eval.job import FULL
from kvx.eval.records import Cell
from kvx.eval.report.depths import DepthMap, depth_maps
from kvx.eval.report.findings import MODES
from kvx.eval.report.kept_maps import kept_maps
from kvx.eval.report.policy_names import family, label
from kvx.eval.report.study import Study
from kvx.eval.statistics import Interval
from kvx.eval.summary import Row


def payload(study: Study) -> dict[str, Any]:
    """Tables that name cells and policies by their index; intervals are [mean, low, high, count]."""
    cells: list[Cell] = list(dict.fromkeys([*(row.cell for row in study.rows), *(each.cell for each in study.kept)]))
    policies = _policies(study)
    return {
        "modes": MODES,
        "cells": [asdict(cell) for cell in cells],
        "policies": [
            {"text": each, "label": label(each), "family": family(each), "full": each == FULL} for each in policies
        ],
        "rows": [_row(row, cells, policies) for row in study.rows],
        "depths": [_depths(each, policies) for each in depth_maps(study.records)],
        "kept": kept_maps(study.kept, cells, policies),
        "costs": [{**_rounded(asdict(cost)), "policy": policies.index(cost.policy)} for cost in study.costs],
    }


def as_island(data: dict[str, Any]) -> str:
    """JSON that nothing can end but its own element: no `<`, `>` or `&`, and only ASCII."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policies(study: Study) -> list[str]:
    """The full cache first, then family by family, each in the order of the rows: by bytes."""
    found = dict.fromkeys(each.policy for each in [*study.rows, *study.kept, *study.costs])
    return sorted(found, key=lambda policy: (policy != FULL, family(policy)))


def _row(row: Row, cells: Sequence[Cell], policies: Sequence[str]) -> dict[str, Any]:
    return {
        "cell": cells.index(row.cell),
        "policy": policies.index(row.policy),
        "score": _interval(row.score),
        "share": _rounded(row.share),
        "stored": row.cache_bytes,
        "read": row.bytes_read,
        "retention": _rounded(row.retention),
        "difference": None if row.difference is None else _interval(row.difference),
        "lower": row.lower_is_better,
        "measures": {name: _interval(each) for name, each in row.measures.items()},
    }


def _depths(found: DepthMap, policies: Sequence[str]) -> dict[str, Any]:
    return {
        "model": found.model,
        "task": found.task,
        "mode": found.mode,
        "policy": policies.index(found.policy),
        "bins": found.bins,
        "boxes": [[length, place, *_interval(each)] for (length, place), each in found.boxes.items()],
    }


def _interval(found: Interval) -> list[Any]:
    return [_rounded(found.mean), _rounded(found.low), _rounded(found.high), found.count]


def _rounded(value: Any) -> Any:
    """Floats with six digits, and those that are not finite as nothing: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value
