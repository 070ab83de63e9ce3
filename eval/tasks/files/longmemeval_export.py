"""LongMemEval's answers as the file that its official judge reads: one {question_id, hypothesis} a line."""

import json
from collections.abc import Sequence
from pathlib import Path

from kvx.errors import BadInput
from kvx.eval.records import Record
from kvx.eval.tasks.files.longmemeval import selected


def export(
    records: Sequence[Record], file: Path, *, path: str, seed: int, subset: str = "factual", shuffle: bool = False
) -> None:
    """Write one policy's answers for `evaluate_qa.py` of LongMemEval.

    Args:
        records: of one cell under one policy.
        file: what is written; it must not exist.
        path, subset, shuffle: as the task was given them.
        seed: of the job.

    Raises:
        BadInput: no records, records of several cells or policies, or of more questions than the data has; a file that
            exists.
    """
    kinds = {(record.cell, record.policy) for record in records}
    if len(kinds) != 1:
        raise BadInput(f"records are of {len(kinds)} cells and policies; allowed: those of one")
    if file.exists():
        raise BadInput(f"{str(file)!r} exists; allowed: a new file")
    asked = selected(path, max(record.index for record in records) + 1, seed, subset, shuffle)
    if any(record.index >= len(asked) for record in records):
        raise BadInput(f"records are of more questions than the {len(asked)} of path={path!r}; allowed: the same data")
    lines = [
        {"question_id": asked[record.index].text("question_id"), "hypothesis": record.answers[0].strip()}
        for record in sorted(records, key=lambda record: record.index)
    ]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
