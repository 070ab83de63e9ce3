"""`python -m kvx.train.convert` on a tiny model: what it writes, and one line for what it refuses."""

import json

import jax.numpy as jnp
import pytest

import kvx
from kvx.cli import run
from kvx.models.build import random_model
from kvx.train.convert import convert, recipe
from kvx.train.convert.__main__ import app
from tests.tiny import CONFIG
from tests.train.letters import letters


def call(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        run(app, "convert", [str(each) for each in arguments])
    found = capsys.readouterr()
    return ended.value.code or 0, found.out, found.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and the same converted."""
    path = tmp_path_factory.mktemp("models")
    source = random_model({**CONFIG, "vocab_size": 98, "num_hidden_layers": 2}, seed=0, dtype=jnp.float32)
    kvx.save(source, letters(), path / "source")
    for name, layers in (("latent", "all"), ("hybrid", (1,))):
        kvx.save(convert(source, recipe("x_ecomla", rank=16, rotary=16, layers=layers))[0], letters(), path / name)
    return path


def test_a_converted_model_is_exported_as_deepseek(folder, tmp_path, capsys):
    status, _, err = call(capsys, "export", folder / "latent", tmp_path / "out", "--dtype", "float32")
    assert status == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["qk_rope_head_dim"] == 16
    assert {"model.safetensors", "tokenizer.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    status, out, _ = call(capsys, "export", "--help")
    assert status == 0 and "convert export runs/by_effect_smollm2_135m/model" in out


@pytest.mark.parametrize(
    ("model", "out", "sentence"),
    [
        ("hybrid", "new", "layer 0 of the model has no latent attention: expected it in every layer"),
        ("latent", "source", "source' is in the way; allowed: a new directory, or an empty one"),
    ],
)
def test_what_cannot_be_exported_is_one_line(folder, capsys, model, out, sentence):
    status, printed, err = call(capsys, "export", folder / model, folder / out)
    assert status == 2 and printed == "" and sentence in err and err.count("\n") == 1
    assert not (folder / "new").exists()


@pytest.mark.slow
def test_a_comparison_shows_what_our_start_owes_to_which_part(folder, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "abcde fgh " * 9}) + "\n" for _ in range(8)))
    recipes = [f"by_effect(rank=16, rotary=16{part})" for part in ("", ", attended=False", ", fold=2")]
    options = ["--model", folder / "source", "--text", text, "--held-out", text, "--calibration", 4, "--measured", 2]
    status, out, err = call(capsys, "compare", *recipes, *options, "--length", 32, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0, err
    assert [row["recipe"] for row in rows] == ["source", *recipes] and {row["dtype"] for row in rows} == {"float32"}
    assert len({row["perplexity"] for row in rows}) == 4
