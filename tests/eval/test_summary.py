"""Claims about the table: what a row is made of, pairing by sample and prompt, and that order does not matter."""

import csv
import io
import random
from dataclasses import replace

import numpy as np
import pytest

from kvx.eval.records import Cell, Record
from kvx.eval.statistics import Interval
from kvx.eval.summary import FIDELITY, as_csv, as_markdown, summary

CELL = Cell("m", "passkey", 2048, "agnostic")


def record(policy, index, score, cell=CELL, **more) -> Record:
    values = {
        "sha256": f"prompt {index}", "tokens": 2000, "depth": 0.5, "answers": ("a",), "expected": (("a",),),
        "cache_bytes": 500, "bf16_bytes": 1000, "bytes_read": 100,
    }  # fmt: skip
    return Record(cell, policy, index, scores=(score,), **{**values, **more})


RECORDS = [
    *(record("full", index, score, cache_bytes=2000) for index, score in enumerate((1.0, 1.0, 1.0, 0.0))),
    *(record("small", index, score, retention=0.25) for index, score in enumerate((1.0, 0.0, 0.0, 0.0))),
    *(record("full", index, 0.0, replace(CELL, task=FIDELITY), measures={"perplexity": 9.0}) for index in range(3)),
    *(record("small", index, 0.5 + index, replace(CELL, task=FIDELITY)) for index in range(3)),
]


def test_the_order_of_records_and_an_answer_given_twice_change_nothing():
    shuffled = [*RECORDS, RECORDS[5]]
    random.Random(0).shuffle(shuffled)
    assert summary(shuffled) == summary(RECORDS)


def test_a_row_holds_means_shares_and_the_paired_difference():
    rows = {(row.cell.task, row.policy): row for row in summary(RECORDS)}
    small = rows["passkey", "small"]
    assert small.score == Interval.wilson(np.asarray([1.0, 0, 0, 0])) and small.share == 0.5
    assert small.retention == 0.25 and small.difference.mean == -0.5 and small.difference.count == 4
    assert rows["passkey", "full"].difference is None


def test_divergences_have_intervals_of_their_own_and_less_is_better():
    rows = {(row.cell.task, row.policy): row for row in summary(RECORDS)}
    full, small = rows[FIDELITY, "full"], rows[FIDELITY, "small"]
    assert full.lower_is_better and (full.score.low, full.score.high) == (0, 0), "an exact nothing is no share of 3"
    assert small.score == Interval.of(np.asarray([0.5, 1.5, 2.5])) and full.measures["perplexity"].mean == 9


def test_only_samples_of_equal_prompts_are_paired():
    changed = [replace(each, sha256="other") if each.policy == "small" and each.index < 2 else each for each in RECORDS]
    row = next(row for row in summary(changed) if row.policy == "small" and row.cell == CELL)
    assert row.difference.count == 2 and row.difference.mean == pytest.approx(-0.5)


def test_a_spreadsheet_and_a_results_file_say_the_same():
    rows = summary(RECORDS)
    lines = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert len(lines) == len(rows) == 4
    told = as_markdown(rows)
    assert "passkey, agnostic (n = 4)" in told and "fidelity (n = 3)" in told
    for line in lines:
        assert f"{float(line['score']):.3f} [{float(line['score_low']):.3f}, {float(line['score_high']):.3f}]" in told
    assert "| small | 50.0% | 10.0% |" in told
