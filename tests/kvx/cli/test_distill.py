"""`kvx distill`: a tiny model through a whole job, stopped and resumed, and what is refused before it begins."""

import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.tree_util import tree_leaves_with_path as leaves_with_path

import kvx
from kvx.cli import main
from kvx.models.build import random_model
from kvx.train import start
from kvx.train.convert import recipe
from tests.tiny import CONFIG
from tests.train.apart import ended, start_processes
from tests.train.letters import letters

JOB = """
name = "tiny"
model = "{folder}/source"
saved_dtype = "float32"
output = "{folder}/run"
[convert]
recipe = "transmla"
layers = [0, 1]
calibration_tokens = 128
[convert.options]
rank = 48
rotary = 16
fold = 2
[teacher]
dtype = "float32"
[data]
train = ["{folder}/train.jsonl"]
held_out = ["{folder}/valid.jsonl"]
sequence = 32
[data.pairs]
train = ["{folder}/pairs.jsonl"]
sequence = 24
prompt = 12
[[stages]]
steps = 12
batch = 8
learning_rate = 3e-3
compute_dtype = "float32"
loss.ce = 1.0
loss.kl = 0.1
[[stages]]
kind = "dpo"
steps = 2
batch = 8
learning_rate = 1e-4
compute_dtype = "float32"
[checkpoint]
every = 4
[evaluate]
every = 6
tokens = 256
policies = ["full", "streaming_llm(budget=16)"]
"""


def call(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["distill", *map(str, arguments)])
    found = capsys.readouterr()
    return ended.value.code, found.out, found.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, its tokenizer, texts and preferences on disk."""
    path = tmp_path_factory.mktemp("distill")
    config = {**CONFIG, "vocab_size": 98, "num_hidden_layers": 2, "eos_token_id": 1}
    kvx.save(random_model(config, seed=0, dtype=jnp.float32), letters(), path / "source")
    words = random.Random(0)
    for name, count in (("train", 40), ("valid", 10)):
        texts = ("".join(words.choices("abcdefgh ", k=words.randint(5, 90))) for _ in range(count))
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pair = {"prompt": "say ab", "chosen": "abab", "rejected": "ba"}
    (path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 40)
    (path / "job.toml").write_text(JOB.format(folder=path))
    return path


def test_help_has_examples(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0 and "configs/xecomla_smollm2_135m.toml" in out and "--aot" in out


def test_a_dry_run_checks_everything_and_leaves_nothing(folder, capsys):
    status, out, _ = call(capsys, folder / "job.toml", "--dry-run", "--json", f"output={folder}/dry")
    plan = json.loads(out)
    assert status == 0 and not (folder / "dry").exists()
    assert [stage["steps"] for stage in plan["stages"]] == [12, 2]
    assert plan["documents"] == 40 and plan["pairs"] == 40 and plan["mesh"]["data"] == 8
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    assert plan["tokens"] == sum(map(len, texts)) + 2 * 40
    assert [stage["epochs"] for stage in plan["stages"]] == [12 * 8 * 32 / plan["tokens"], 2 * 8 / 40]
    assert plan["stages"][0]["tokens_of_a_step"] == 8 * 32
    assert (plan["before"], plan["after"], plan["dtype"]) == (2 * 4 * 2 * 2 * 32, 2 * 4 * (48 + 16), "float32")
    status, out, _ = call(capsys, folder / "job.toml", "--dry-run", "saved_dtype=bfloat16")
    assert status == 0 and "transmla(rank=48" in out and "token, bfloat16" in out
    assert f"{2 * 2 * 2 * 2 * 32} before, {2 * 2 * (48 + 16)} (50.0%) after" in out


def test_preferences_may_be_tables_of_messages(folder, tmp_path, capsys):
    """As UltraFeedback is distributed."""
    said = [[{"role": "user", "content": "say ab"}, {"role": "assistant", "content": text}] for text in ("abab", "ba")]
    pq.write_table(pa.table({"chosen": [said[0]] * 16, "rejected": [said[1]] * 16}), tmp_path / "pairs.parquet")
    row = f'data.pairs.train=["{tmp_path}/pairs.parquet"]'
    status, out, error = call(capsys, folder / "job.toml", "--dry-run", "--json", f"output={tmp_path}/dry", row)
    assert status == 0 and json.loads(out)["pairs"] == 16, error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stages.0.btach=3"], "did you mean 'stages.0.batch'"),
        (["convert.options.rank=200"], "convert: rank=200 is out of range; allowed: 1 to 65"),
        (["convert.layers=[2]"], "convert: layers=(2,) names a layer that does not exist; allowed: 0 to 1"),
        (["stages.0.batch=12"], "stages.0: batch=12"),
        (["data.train=['{folder}/blank.txt']"], "holds no text"),
        (["data.train=['{folder}/broken.jsonl']"], "broken.jsonl:2 is not JSON"),
        (["model={folder}/other"], "has 98 tokens; allowed: at most 97"),
        (["--stage", "2"], "--stage 2; allowed: 0 to 1"),
        (["teacher.model={folder}/turned"], "has another tokenizer: 'a' is token"),
        (["output={folder}/foreign"], "/foreign' holds model/ of no run; allowed: another folder"),
        (["data.sequence=1024"], "data.held_out holds "),
        (["data.held_out=['{folder}/late.npy']"], "late.npy has token id 98; allowed: 0 to 97, the vocabulary"),
        (["data.held_out=['{folder}/valid.jsonl', '{folder}/chat.jsonl']"], "the model has no chat template"),
        (["data.train=['{folder}/mixed.jsonl']"], "the model has no chat template"),
        (["--resume"], "/run' holds no run; allowed: no --resume"),
        (
            ["data.held_out=['python-docs/second-half']", "evaluate.passkey=1", "evaluate.passkey_length=4090"],
            "tokens with the answer; allowed: at most 4096, the model's positions",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_with_status_2(folder, capsys, arguments, sentence):
    (folder / "blank.txt").write_text(" \n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "foreign" / "model").mkdir(parents=True, exist_ok=True)
    np.save(folder / "late.npy", np.array([*range(98), 98], np.uint16))
    (folder / "mixed.jsonl").write_text('{"text": "a"}\n{"text": [{"role": "user", "content": "a"}]}\n')
    (folder / "chat.jsonl").write_text('{"text": [{"role": "user", "content": "a"}]}\n')
    if not (folder / "other").exists():
        config = {**CONFIG, "num_hidden_layers": 2}
        kvx.save(random_model(config, seed=0, dtype=jnp.float32), letters(), folder / "other")
        model, tokenizer = random_model({**config, "vocab_size": 98}, seed=0, dtype=jnp.float32), letters()
        vocabulary = tokenizer.specification["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        kvx.save(model, tokenizer, folder / "turned")
    arguments = [each.replace("{folder}", str(folder)) for each in arguments]
    status, out, err = call(capsys, folder / "job.toml", "--dry-run", *arguments)
    assert status == 2 and out == "" and sentence in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_job_trains_resumes_and_saves_what_kvx_loads(folder, capsys, monkeypatch):
    """Stopped by its time limit after a step, resumed to the end: the curve of the run that was not stopped."""
    job = folder / "job.toml"
    status, out, _ = call(capsys, job, "--json", "--seconds", "0")
    stopped = json.loads(out)
    assert status == 0 and not stopped["finished"] and stopped["steps"] == [1]
    status, _, err = call(capsys, job)
    assert status == 2 and "holds a run; allowed: --resume" in err
    status, _, err = call(capsys, job, "--resume", "seed=1")
    assert status == 2 and "seed=1, but the run in " in err and "begun with 0; allowed: changes of mesh" in err
    with monkeypatch.context() as patch:
        patch.setattr(start, "converted", None)  # a resumed run has its student from the checkpoint
        status, out, _ = call(capsys, job, "--resume", "--json", "checkpoint.every=3")
    result = json.loads(out)
    assert status == 0 and result["finished"] and result["steps"] == [12, 2]
    told = result["conversion"]
    assert told["after"] == 2 * 4 * (48 + 16) and told["before"] == 2 * 4 * 2 * 2 * 32 and told["dtype"] == "float32"
    assert [(each["rank"], each["after"]) for each in told["layers"]] == [(48, 4 * (48 + 16))] * 2
    assert json.loads((folder / "run" / "conversion.json").read_text()) == told, "the stopped run wrote it"
    first, last = result["held_out"]
    assert last < first  # it learns
    assert [each["policy"] for each in result["verdicts"]] == ["full", "streaming_llm(budget=16)"]

    whole = folder / "whole"
    status, out, _ = call(capsys, job, "--json", f"output={whole}")
    assert json.loads(out)["held_out"] == [first, last]
    model, tokenizer = kvx.load(folder / "run" / "model")
    assert all(block.spec.latent for block in model.blocks)
    tokens = jnp.asarray([tokenizer.encode("abcabc")], jnp.int32)
    other, _ = kvx.load(whole / "model")
    np.testing.assert_array_equal(model(tokens), other(tokens))
    generated = kvx.generate(model, tokens, policy=kvx.parse_policy("knorm(budget=4)"), max_new_tokens=3)
    assert generated.tokens.shape == (1, 3)


@pytest.mark.slow
def test_preferences_that_are_resumed_keep_the_reference_that_they_began_with(folder, capsys):
    """Stopped at the end of the first stage and within the second: the losses of the run that was not stopped."""
    job, changes = folder / "job.toml", ["stages.0.steps=1", "stages.1.steps=3", "stages.1.learning_rate=1e-2"]
    changes += ["stages.1.warmup=0", "evaluate.policies=[]", "checkpoint.every=100"]

    def lines(name):
        text = (folder / name / "stage-1-dpo" / "metrics.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if "loss" in line]

    stops = ([*extra, "--seconds", "0"] for extra in ([], ["--resume"]))
    for reached, extra in zip(([1], [1, 1], [1, 3]), (*stops, ["--resume"]), strict=True):
        status, out, _ = call(capsys, job, "--json", *extra, f"output={folder}/parts", *changes)
        assert status == 0 and json.loads(out)["steps"] == reached
    status, _, _ = call(capsys, job, "--json", f"output={folder}/one", *changes)
    parts, one = lines("parts"), lines("one")
    assert status == 0 and [line["loss"] for line in parts] == [line["loss"] for line in one]
    assert one[0]["loss"] == pytest.approx(np.log(2), rel=1e-6) and one[0]["margin"] == 0
    assert abs(parts[1]["margin"]) > 1e-3, "the reference is not the student that was resumed"


def finished(capsys, folder, name, *changes):
    """What a job of one stage says at its end, and the models before and after it."""
    stage = "stages=[{{steps=6, batch=8, learning_rate=3e-3, compute_dtype='float32', loss={{ce=1.0}}{}}}]"
    changes = [stage.format(changes[0]), "evaluate.policies=[]", *changes[1:]]
    status, out, _ = call(capsys, folder / "job.toml", "--json", f"output={folder}/{name}", *changes)
    result = json.loads(out)
    assert status == 0 and result["finished"] and result["held_out"][1] < result["held_out"][0]
    return result, kvx.load(folder / "source", dtype="float32")[0], kvx.load(folder / name / "model")[0]


@pytest.mark.slow
def test_attention_alone_is_trained_where_some_layers_are_converted(folder, capsys):
    """What was converted, and nothing else: the other layer, its attention too, stays bit for bit."""
    rows = ["convert.recipe=x_ecomla", "convert.layers=[1]", "convert.options={rank=48, rotary=16}"]
    _, source, student = finished(capsys, folder, "hybrid", ", train='attention'", *rows)
    assert [block.spec.latent for block in student.blocks] == [False, True]
    latent = [recipe("x_ecomla", rank=48, rotary=16, layers=(1,))(source)[0], student]
    begun, ended = ({jax.tree_util.keystr(path): leaf for path, leaf in leaves_with_path(each)} for each in latent)
    moved = {name for name, leaf in ended.items() if not np.array_equal(leaf, begun[name])}
    assert moved == {name for name in ended if ".blocks[1].attention." in name and "frequencies" not in name}


@pytest.mark.slow
def test_fewer_heads_are_trained_as_any_conversion_is(folder, capsys):
    rows = ["convert.recipe=gqa", "convert.layers=all", "convert.options={kv_heads=1}"]
    result, source, student = finished(capsys, folder, "grouped", "", *rows)
    assert result["conversion"]["before"] == 2 * result["conversion"]["after"]
    assert [block.spec.kv_heads for block in student.blocks] == [1, 1]
    pooled, _ = recipe("gqa", kv_heads=1)(source)
    kernels = [each.blocks[0].attention.qkv.kernel[...] for each in (pooled, student)]
    assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.1, "trained from the pooled heads on"


@pytest.mark.slow
def test_two_processes_begin_one_job_in_one_folder(folder):
    """Both look at the folder before either writes to it, and end together though one of them judges alone."""
    command = ["-c", "from kvx.cli import main; main()", "distill", str(folder / "job.toml"), "--json"]
    shown = ended(
        start_processes([*command, f"output={folder}/shared", "checkpoint.every=100"], processes=2, devices=4)
    )
    result = json.loads(shown[shown.index("{\n") :])  # behind what Gloo says
    assert result["finished"] and result["steps"] == [12, 2]
    assert [each["policy"] for each in result["verdicts"]] == ["full", "streaming_llm(budget=16)"]
    assert kvx.load(folder / "shared" / "model")[0].blocks[0].spec.latent
