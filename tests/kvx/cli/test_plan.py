"""Claims about `kvx plan`: examples, a table, JSON, a picture, and bad input as one line with exit status 2."""

import json

import pytest
import typer
from typer.testing import CliRunner

from kvx.cli import run
from kvx.cli.plan import plan
from tests.tiny import CONFIG


@pytest.fixture
def planned(tmp_path, capsys):
    """Runs the command for the tiny model: exit status, standard output, standard error."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**CONFIG, "max_position_embeddings": 768, "num_hidden_layers": 2}))
    app = typer.Typer()
    app.command()(plan)

    def ran(*arguments):
        with pytest.raises(SystemExit) as end:
            run(app, "kvx", (str(path), "--context", "256", *arguments))
        shown = capsys.readouterr()
        return end.value.code, shown.out, shown.err

    return ran


def test_help_has_examples():
    app = typer.Typer()
    app.command()(plan)
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0 and "kvx plan configs/models/llama-3.1-8b.json" in shown.output


def test_a_table_with_formulas_and_a_picture(planned, tmp_path):
    picture = tmp_path / "plan.png"
    status, out, _ = planned("-p", "kivi(bits=2, group=32)", "--formulas", "--out", str(picture))
    assert status == 0 and "kivi(bits=2, group=32)" in out and "T_pre = max" in out and "16.00 GiB" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_has_the_full_cache_first_and_once(planned):
    status, out, _ = planned(
        "-p", "full", "-p", "quest(budget=64, skip=(0,))", "--chip", "h100", "--users", "3", "--json"
    )
    found = json.loads(out)
    assert status == 0 and [each["policy"] for each in found["policies"]] == ["full", "quest(budget=64, skip=(0,))"]
    full, quest = found["policies"]
    # A sparse read stores more than all of it and reads less.
    assert quest["cache"] > full["cache"] and quest["read"] < full["read"]
    assert quest["largest_batch"] <= full["largest_batch"] and found["users"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--chip", "v7"), "unknown chip 'v7'"),
        (("--chip", "v5"), "did you mean"),
        (("--context", "0"), "context=0"),
        (("--context", "5000"), "context=5000; allowed: 1 to 640, the 768 positions of"),
        (("--context", "99999999999"), "allowed: an int from 1 to 2147483647"),
        (("--out", "/nowhere/plan.png"), "lies in no folder"),
        (("--chips", "0"), "chips=0"),
        (("-p", "q_filters(budget=64)"), "q_filters"),
        (("-p", "snapkv(budget=0)"), "budget=0"),
        (("--dtype", "int4"), "dtype"),
        (("--out", "plan.pdf"), "allowed: a .png"),
        (("--chip", "H100", "--check"), "no compiler"),
    ],
)
def test_bad_input_is_one_line(planned, arguments, words):
    status, out, err = planned(*arguments)
    assert status == 2 and not out and words in err and err.count("\n") == 1


def test_a_prompt_is_as_long_as_the_model_allows_if_nothing_is_said(tmp_path, capsys):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**CONFIG, "max_position_embeddings": 768, "num_hidden_layers": 1}))
    app = typer.Typer()
    app.command()(plan)
    with pytest.raises(SystemExit):
        run(app, "kvx", (str(path), "--json"))
    assert json.loads(capsys.readouterr().out)["context"] == 640
