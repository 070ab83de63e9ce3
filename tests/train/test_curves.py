"""Claims about learning curves: one command, a run of its own for each start, read again where it is over."""

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

import kvx
from kvx.errors import BadInput
from kvx.train.convert.__main__ import app as convert_app
from kvx.train.curve import folder_of
from kvx.train.curves import app, collect
from kvx.train.data import Encoding
from kvx.train.data.tokenise import tokenise
from tests import tiny
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
    np.save(tmp_path / "train.npy", text(seed=1))
    other = CliRunner().invoke(app, command)
    assert isinstance(other.exception, BadInput) and "texts.train='4000 tokens, " in str(other.exception)
    np.save(tmp_path / "train.npy", text())
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert (folder_of(tmp_path / "out", starts[1], 0) / "metrics.jsonl").stat().st_mtime_ns == written


@pytest.fixture
def shapes_only(tmp_path, monkeypatch) -> str:
    """A model's folder from which no weight can be read, with texts of ids beside it."""

    def never(*_, **__):
        raise AssertionError("weights were read")

    kvx.save(tiny.model(), None, tmp_path / "model")
    kvx.save(tiny.model(vocab_size=98), None, tmp_path / "other")
    np.save(tmp_path / "train.npy", text(90_000))
    (tmp_path / "prose.txt").write_text("no ids, but an even number of bytes  " * 5000)
    kept = Encoding(None, 1 << 17)  # a vocabulary for which ids are written as uint32
    tokenise(np.array_split(text(90_000), 9), kept, tmp_path / "wide.bin")
    np.save(tmp_path / "late.npy", np.append(text(90_000), 97).astype(np.uint16))
    monkeypatch.setattr(kvx, "load", never)
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--start", "x_ecomla(rank=640, rotary=32)"], "x_ecomla(rank=640, rotary=32): rank=640 is out of range"),
        (["--start", "gqa(kv_heads=3)"], "gqa(kv_heads=3): kv_heads=3 is out of range"),
        (["--start", "{folder}/other"], "/other' has a vocabulary of 98; allowed: the source's 97"),
        (["--start", "{folder}"], "{folder}"),
        (["--length", "8192", "--batch", "8"], "length=8192; allowed: at most 4096, the model's positions"),
        (["--train", "{folder}/prose.txt"], "/prose.txt is no file of token ids; allowed: .npy or .bin"),
        (["--train", "{folder}/wide.bin"], "wide.bin.ends does not fit the 180000 tokens of wide.bin, read as uint16"),
        (["--held-out", "{folder}/late.npy"], "/late.npy has token id 97; allowed: 0 to 96, the vocabulary"),
    ],
)
def test_what_a_later_curve_cannot_be_is_refused_before_weights_are_read(shapes_only, tmp_path, options, sentence):
    texts = ["--train", f"{tmp_path}/train.npy", "--held-out", f"{tmp_path}/train.npy", "--calibration", "8"]
    command = [f"{tmp_path}/out", "--start", "none", "--model", shapes_only, *texts]
    options = [each.replace("{folder}", str(tmp_path)) for each in options]
    found = CliRunner().invoke(app, [*command, *options]).exception
    assert isinstance(found, BadInput) and sentence.replace("{folder}", str(tmp_path)) in str(found)


def test_ids_of_either_width_are_read_where_they_are_said_to_be(shapes_only, tmp_path):
    texts = [part for name in ("train", "held-out") for part in (f"--{name}", f"{tmp_path}/wide.bin")]
    command = [f"{tmp_path}/out", "--start", "none", "--model", shapes_only, "--calibration", "8", *texts]
    found = CliRunner().invoke(app, [*command, "--tokens-dtype", "uint32"]).exception
    assert "weights were read" in str(found), "all texts passed"
    found = CliRunner().invoke(app, [*command, "--tokens-dtype", "int8"])
    assert found.exit_code == 2 and "int8" in found.output


@pytest.mark.parametrize("command", [["apply", "{recipe}", "{folder}/out"], ["compare", "gqa(1)", "{recipe}"]])
def test_a_conversion_that_the_model_cannot_have_is_refused_before_weights_are_read(shapes_only, tmp_path, command):
    (tmp_path / "a.txt").write_text("text")
    texts = ["--text", f"{tmp_path}/a.txt"]
    texts += ["--held-out", f"{tmp_path}/a.txt"] if command[0] == "compare" else []
    recipe = "transmla(rank=640, rotary=32)"
    command = [part.replace("{recipe}", recipe).replace("{folder}", str(tmp_path)) for part in command]
    found = CliRunner().invoke(convert_app, [*command, *texts, "--model", shapes_only]).exception
    assert isinstance(found, BadInput) and f"{recipe}: rank=640 is out of range" in str(found)


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
