"""Claims about learning curves: one command, a run of its own for each start, read again where it is over."""

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

import kvx
from kvx.errors import BadInput
from kvx.train.curve import folder_of
from kvx.train.curves import app, collect
from tests.train.tiny_runs import models, text


@pytest.mark.slow
def test_curves_are_trained_once_and_written_together(tmp_path):
    import tokenizers
    import tokenizers.models

    kvx.save(models()[0], None, tmp_path / "model")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(
        str(tmp_path / "model" / "tokenizer.json")
    )
    np.save(tmp_path / "train.npy", text())
    np.save(tmp_path / "judge.npy", text()[-800:])
    starts = ["none", "x_ecomla(rank=8, rotary=8)"]
    options = ["--model", str(tmp_path / "model"), "--train", str(tmp_path / "train.npy")]
    options += ["--held-out", str(tmp_path / "judge.npy"), "--tokens", "1600", "--length", "16", "--rate", "1e-3"]
    options += ["--evaluations", "2", "--calibration", "8", "--judged", "256"]
    command = [str(tmp_path / "out"), *(part for start in starts for part in ("--start", start)), *options]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "curves.jsonl").read_text().splitlines()]
    by_start = {start: [line for line in lines if line["start"] == start] for start in starts}
    for found in by_start.values():
        assert [line["step"] for line in found] == [0, 6, 12]
        assert found[-1]["tokens"] == 12 * 8 * 16
    control, latent = by_start.values()
    assert control[0]["perplexity"] == pytest.approx(control[0]["teacher_perplexity"], rel=1e-5)
    assert latent[-1]["perplexity"] < latent[0]["perplexity"]
    with open(tmp_path / "out" / "curves.csv", newline="") as stream:
        assert [float(row["perplexity"]) for row in csv.DictReader(stream)] == [line["perplexity"] for line in lines]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = (folder_of(tmp_path / "out", starts[1], 0) / "metrics.jsonl").stat().st_mtime_ns
    other = CliRunner().invoke(app, [*command, "--rate", "1e-4"])
    assert isinstance(other.exception, BadInput) and "stage.learning_rate=0.0001, but" in str(other.exception)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert (folder_of(tmp_path / "out", starts[1], 0) / "metrics.jsonl").stat().st_mtime_ns == written


def test_folders_of_starts_that_read_alike_are_not_the_same(tmp_path):
    assert folder_of(tmp_path, "a(1)", 0) != folder_of(tmp_path, "a[1]", 0) != folder_of(tmp_path, "a[1]", 1)


def test_passkeys_are_written_and_drawn_where_they_were_asked_for(tmp_path):
    kinds = {"a": {"passkey": 0.5, "teacher_passkey": 1.0}, "b": {}}
    for start, beside in kinds.items():
        folder = folder_of(tmp_path, start, 0)
        folder.mkdir()
        line = {"step": 3, "held_out": 2.0, "perplexity": 7.4, "teacher_held_out": 1.0, **beside}
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 1.0}) + "\n" + json.dumps(line) + "\n")
    found = collect(tmp_path, [(start, 0) for start in ("b", "a", "never run")], 10)
    assert [(line["start"], line["tokens"], line.get("passkey")) for line in found] == [("b", 30, None), ("a", 30, 0.5)]
    with open(tmp_path / "curves.csv", newline="") as stream:
        assert [row["teacher_passkey"] for row in csv.DictReader(stream)] == ["", "1.0"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
