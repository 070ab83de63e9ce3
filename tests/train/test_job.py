"""Job files: what they may say, how they extend and are overridden, and every refusal in one sentence."""

import json
from pathlib import Path

import pytest

from kvx.errors import BadInput
from kvx.section_file import table_from
from kvx.train import metrics
from kvx.train.job import ConvertSection, Job, MeshSection
from kvx.train.job_checks import check_job
from kvx.train.job_file import read_job
from kvx.train.stage import StageSection
from tests.tiny import CONFIG

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "configs").glob("*.toml"))

MINIMAL = """
name = "a"
model = "smollm2-135m-instruct"
[convert.options]
rank = 16
[data]
train = ["x.jsonl"]
[[stages]]
tokens = 1_000_000
"""


def job_file(folder: Path, text: str = MINIMAL, name: str = "job.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_every_job_of_the_repository_is_read_and_its_models_are_checked():
    assert {path.stem for path in JOBS} >= {
        "xecomla_smollm2_135m",
        "transmla_smollm2_135m",
        "xecomla_llama32_1b",
        "xecomla_llama31_8b",
    }
    for path in JOBS:
        job = read_job(path)
        assert job.name == path.stem
        if job.shapes is not None:  # the others need the weights' file
            check_job(job, here=False)


def test_a_job_says_what_its_file_says_and_defaults_do_the_rest(tmp_path):
    job = read_job(job_file(tmp_path))
    stage = StageSection(tokens=1_000_000)
    assert job.stages == (stage,) and job.output == "runs/a"
    assert job.convert == ConvertSection(options={"rank": 16})
    assert stage.total_steps(2048) == 1_000_000 // (8 * 2048)


def test_a_file_extends_another_by_sections_and_takes_values_whole(tmp_path):
    job_file(tmp_path, MINIMAL, "base.toml")
    upper = 'extends = "base.toml"\nname = "b"\n[convert]\nrecipe = "transmla"\n[convert.options]\nrotary = 32\n'
    job = read_job(job_file(tmp_path, upper + "[data]\nsequence = 128\n"))
    assert job.name == "b" and job.model == "smollm2-135m-instruct"
    assert job.convert == ConvertSection("transmla", options={"rotary": 32})
    assert job.data.train == ("x.jsonl",) and job.data.sequence == 128
    job_file(tmp_path, 'extends = "job.toml"\n', "third.toml")
    with pytest.raises(BadInput, match="one level"):
        read_job(tmp_path / "third.toml")


def test_overrides_come_last_and_reach_into_lists_and_tables(tmp_path):
    path = job_file(tmp_path)
    job = read_job(
        path,
        [
            "stages.0.tokens=64",
            "stages.0.loss.kl=0.5",
            "convert.options.rank=8",
            "convert.layers=[1, 2]",
            "evaluate.policies=['full', 'snapkv(budget=64)']",
            "output=runs/other",
            "data.shuffle=false",
            "stages.0.tokens=32",
        ],
    )
    assert job.stages[0].tokens == 32 and job.stages[0].loss.kl == 0.5
    assert job.convert == ConvertSection(layers=(1, 2), options={"rank": 8})
    assert job.evaluate.policies == ("full", "snapkv(budget=64)")
    assert job.output == "runs/other" and job.data.shuffle is False


def test_a_job_survives_as_json(tmp_path):
    job = read_job(job_file(tmp_path), ["convert.layers=[0, 3]", "stages.0.ema=0.99", "mesh.tensor=2"])
    from kvx.section_file import section_from

    assert section_from(Job, json.loads(json.dumps(table_from(job)))) == job


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stage.0.steps=3", "unknown key 'stage': did you mean 'stages'"),
        ("stages.0.btach=3", "unknown key 'stages.0.btach': did you mean 'stages.0.batch'"),
        ("data.pairs.promt=3", "unknown key 'data.pairs.promt'"),
        ("stages.0.batch=0", "stages.0.batch=0; allowed: an integer of at least 1"),
        ("stages.0.batch=true", "stages.0.batch=True; allowed: an integer of at least 1"),
        ("stages.0.batch='8'", "stages.0.batch='8'; allowed: an integer"),
        ("stages.0.learning_rate=0", "learning_rate=0.0; allowed: a finite number above 0"),
        ("stages.0.learning_rate=nan", "learning_rate=nan; allowed: a finite number above 0"),
        ("stages.0.schedule=linear", "schedule='linear'; allowed: 'cosine', 'constant' or 'wsd'"),
        ("stages.0.warmup=1.5", "warmup=1.5; allowed: a finite number of at least 0 and below 1 or an integer"),
        ("stages.0.betas=[0.9]", "betas=(0.9,); allowed: a list of 2"),
        ("stages.0.steps=5", "tokens=1000000 and steps=5; allowed: one of the two"),
        ("stages.0.kind=dpo", "tokens=1000000 of a dpo stage; allowed: steps"),
        ("stages.0.accumulate=3", "accumulate=3; allowed: a divisor of batch=8"),
        ("stages.0.train='('", "train='(', which is no regular expression"),
        ("stages.0.loss.kl=0", "are all 0; allowed: one of them above 0"),
        ("stages.0.ema=1.0", "ema=1.0; allowed: a finite number above 0 and below 1"),
        ("stages=[]", "stages is empty"),
        ("stages=3", "stages=3; allowed: a list, each a table"),
        ("convert=3", "convert=3; allowed: a table"),
        ("convert.layers=some", "layers='some'; allowed: 'all' or a list"),
        ("convert.layers=[-1]", "layers=[-1]; allowed"),
        ("mesh.data=0", "data=0; allowed"),
        ("mesh.tensor=-1", "allowed: -1 for one axis at most"),
        ("data.pairs.prompt=2000", "prompt=2000; allowed: an integer below sequence=1024"),
        ("name='a/b'", "name='a/b'; allowed: letters, digits"),
        ("seed=-1", "seed=-1; allowed: an integer of at least 0 and of at most 4294967295"),
        ("stages.1.batch=3", "'1' is no index of a list; allowed: 0 to 0"),
        ("name.sub=3", "'name' is no table"),
        ("name", "allowed: key.sub=value"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_it(tmp_path, override, sentence):
    with pytest.raises(BadInput) as caught:
        read_job(job_file(tmp_path), [override])
    message = str(caught.value)
    assert sentence in message and "\n" not in message


def test_a_wrong_file_is_one_sentence(tmp_path):
    for text, sentence in (
        ("name = ", "is not TOML"),
        ("\n", "name is missing; allowed: a text"),
        ('extends = 3\nname = "a"', "extends=3"),
        ('extends = "none.toml"', "none.toml' cannot be read"),
    ):
        with pytest.raises(BadInput, match=sentence):
            read_job(job_file(tmp_path, text))
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="is not UTF-8"):
        read_job(tmp_path / "binary.toml")


def test_the_mesh_makes_up_the_devices():
    assert MeshSection(tensor=4, fsdp=2).sizes(16) == {"data": 2, "fsdp": 2, "tensor": 4, "sequence": 1}
    assert MeshSection(data=1, tensor=-1).sizes(8)["tensor"] == 8
    for section in (MeshSection(tensor=3), MeshSection(data=2, tensor=2)):
        with pytest.raises(BadInput, match="product is that of 8 devices"):
            section.sizes(8)


@pytest.fixture
def job(tmp_path) -> Path:
    """A job for the tiny model's shapes, with a text."""
    (tmp_path / "shapes.json").write_text(json.dumps(CONFIG))
    (tmp_path / "other.json").write_text(json.dumps({**CONFIG, "vocab_size": 98}))
    (tmp_path / "wide.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 2}))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "normed.json").write_text(json.dumps({**CONFIG, "architectures": ["Qwen3ForCausalLM"]}))
    (tmp_path / "odd.json").write_text(json.dumps({**CONFIG, "num_attention_heads": 3, "num_key_value_heads": 3}))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    text = MINIMAL.replace('"x.jsonl"', f'"{tmp_path}/a.txt"').replace(
        "[convert", 'shapes = "shapes.json"\n[convert', 1
    )
    return job_file(tmp_path, text)


def test_a_job_that_fits_its_model_passes(job):
    assert len(check_job(read_job(job)).blocks) == 4
    judged = [f"data.held_out=['{job.parent}/b.txt']", "evaluate.policies=['latent_codes(bits=8)', 'knorm(0.5)']"]
    check_job(read_job(job, ["convert.options.energy=0.9", *judged]))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("convert.recipe=x_ecomlaa", "unknown convert.recipe 'x_ecomlaa': did you mean 'x_ecomla'"),
        ("convert.options.rnk=3", "unknown parameter of x_ecomla 'rnk': did you mean 'rank'"),
        ("convert.options.rank=66", "convert: rank=66 is out of range; allowed: 1 to 65"),
        ("convert.options.rank=0", "convert: rank=0 is out of range; allowed: 1 to 65"),
        ("convert.options.rank='8'", "convert: rank='8' of x_ecomla; allowed: an integer"),
        ("convert.options.rotary=34", "convert: rotary=34 is out of range; allowed: even numbers from 0 to 32"),
        ("convert.options.query_rank=100000", "convert: query_rank=100000 is out of range; allowed: 1 to 65"),
        ("convert.layers=[0, 4]", "convert: layers=(0, 4) names a layer that does not exist; allowed: 0 to 3"),
        ("evaluate.policies=['kivi']", "policy=kivi"),
        ("stages.0.train=typo_here", "stages.0: train='typo_here' finds no parameter"),
        ("shapes=list.json", "list.json' holds '[1]'; allowed: a config.json, one object"),
        ("convert.layers=[]", "convert.layers is empty"),
        ("convert.recipe=none", "of recipe 'none'; allowed: none"),
        ("evaluate.policies=['snapkvv(3)']", "did you mean 'snapkv'"),
        ("evaluate.passkey=3", "evaluate.passkey=3 without data.held_out"),
        ("stages.0.batch=4", "stages.0: batch=4"),
        ("data.sequence=8192", "data.sequence=8192; allowed: at most 4096, the model's positions"),
        ("mesh.tensor=3", "whose product is that of 8 devices"),
        ("shapes=nowhere.json", "nowhere.json' cannot be read"),
        ("data.train=['nowhere']", "data.train has 'nowhere', which does not exist"),
        ("data.train=[]", "data.train is empty"),
    ],
)
def test_a_job_that_does_not_fit_its_model_devices_or_data_is_refused(job, override, sentence):
    with pytest.raises(BadInput) as caught:
        check_job(read_job(job, [override]))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluate.passkey=3", "evaluate.passkey_length=4097"], "evaluate.passkey_length=4097; allowed: at most 4096"),
        (["stages=[{kind='dpo', steps=3}]", "data.pairs.sequence=5000"], "data.pairs.sequence=5000; allowed: at most"),
    ],
)
def test_what_is_trained_and_judged_has_positions(job, overrides, sentence):
    with pytest.raises(BadInput, match=sentence):
        check_job(read_job(job, overrides))


def test_a_missing_package_is_told_before_weights_are_read(job, monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda _: None)
    with pytest.raises(BadInput, match=r"tensorboardX is missing, .*; allowed: pip install 'kvx\[train\]'"):
        check_job(read_job(job))
    check_job(read_job(job), here=False)


def test_files_to_judge_by_are_others(job):
    same = f"data.held_out=['{job.parent}']"
    with pytest.raises(BadInput, match=r"data\.held_out has .*a\.txt', which is in data\.train"):
        check_job(read_job(job, [same]))
    check_job(read_job(job, [f"data.held_out=['{job.parent}/b.txt']"]))


def test_a_teacher_predicts_the_same_tokens_and_has_the_layers_that_are_compared(job):
    teacher = ["teacher.model=big"]
    with pytest.raises(BadInput, match="a vocabulary of 98; allowed: 97"):
        check_job(read_job(job, [*teacher, "teacher.shapes=other.json"]))
    with pytest.raises(BadInput, match="2 layers of width 64; allowed: 0, or a teacher of the source's 4"):
        check_job(read_job(job, [*teacher, "teacher.shapes=wide.json", "stages.0.loss.hidden=1"]))
    check_job(read_job(job, [*teacher, "teacher.shapes=wide.json"]))
    with pytest.raises(BadInput, match=r"stages.0.loss.relation=1.0 between 4 and 3 heads"):
        check_job(read_job(job, [*teacher, "teacher.shapes=odd.json", "stages.0.loss.relation=1"]))


def test_a_source_that_norms_its_queries_is_refused_before_its_weights_are_read(job):
    with pytest.raises(BadInput, match="convert: layer=0 norms its queries and keys"):
        check_job(read_job(job, ["shapes=normed.json"]))


def test_a_conversion_that_reads_text_has_some_even_where_no_stage_does(job):
    (job.parent / "pairs.jsonl").write_text("{}\n")
    stages = ["stages=[{kind='dpo', steps=3}]", f"data.pairs.train=['{job.parent}/pairs.jsonl']", "data.train=[]"]
    with pytest.raises(BadInput, match=r"data\.train is empty"):
        check_job(read_job(job, [*stages, "convert.recipe=transmla", "convert.options={rank=8, rotary=8}"]))


def test_preferences_are_there_before_their_stage(job):
    stages = "stages=[{kind='dpo', steps=3}]"
    with pytest.raises(BadInput, match=r"data\.pairs\.train is empty"):
        check_job(read_job(job, [stages]))


def test_an_output_below_a_file_is_refused(job):
    with pytest.raises(BadInput, match="lies below the file"):
        check_job(read_job(job, [f"output={job}/run"]))
