"""Settings that nothing would read, or that contradict each other, are refused and not passed over."""

import json
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.errors import BadInput
from kvx.models.build import abstract_model
from kvx.train.job import MOST_CALIBRATION, ConvertSection, DataSection, EvaluateSection, Job, TeacherSection
from kvx.train.job_checks import check_paths, check_schedules
from kvx.train.material import COUNTED, read_material
from kvx.train.shapes import check_config, student_shapes
from kvx.train.stage import LossSection, StageSection
from tests import tiny
from tests.train.letters import letters


def job(**changes: Any) -> Job:
    """One of 48 steps that converts nothing."""
    default = {"name": "a", "model": "model", "stages": (StageSection(steps=48),), "convert": ConvertSection("none")}
    return Job(**{**default, **changes})


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ({"warmup": 5000}, r"stages\.0\.warmup=5000 of 48 steps; allowed: at most 48 steps in all"),
        ({"warmup": 40, "decay": 20, "schedule": "wsd"}, r"warmup=40 and decay=20 of 48 steps"),
        ({"warmup": 0.5, "decay": 0.6, "schedule": "wsd"}, r"warmup=0\.5 and decay=0\.6 of 48 steps"),
        ({"warmup": 48}, None),
        ({"warmup": 40, "decay": 20}, None),  # decay is of "wsd" alone
        ({"warmup": 28, "decay": 20, "schedule": "wsd"}, None),
        ({"warmup": 0.9, "decay": 0.1, "schedule": "wsd", "steps": 15}, None),
        ({"steps": 1}, None),
    ],
)
def test_a_rate_reaches_its_peak(stage, sentence):
    made = job(stages=(StageSection(**{"steps": 48, **stage}),))
    if sentence is None:
        check_schedules(made)
        return
    with pytest.raises(BadInput, match=sentence):
        check_schedules(made)


def test_tokens_of_a_stage_are_counted_as_its_steps():
    with pytest.raises(BadInput, match=r"warmup=49 of 48 steps"):
        check_schedules(job(stages=(StageSection(tokens=48 * 8 * 16 + 5, warmup=49),), data=DataSection(sequence=16)))


@pytest.mark.parametrize("name", ["ce", "kl", "reverse_kl", "js", "hidden", "relation", "temperature"])
def test_preferences_weigh_no_loss_of_text(name):
    with pytest.raises(BadInput, match=f"loss.{name}=2.0 in a dpo stage, which does not read it; allowed: beta and"):
        StageSection(kind="dpo", steps=3, loss=LossSection(**{name: 2.0}))
    StageSection(steps=3, loss=LossSection(**{name: 2.0}))


def test_text_has_no_beta():
    with pytest.raises(BadInput, match=r"loss\.beta=0\.5 in a distill stage"):
        StageSection(steps=3, loss=LossSection(beta=0.5))
    StageSection(kind="dpo", steps=3, loss=LossSection(beta=0.5, chunk=16))


def test_sections_refuse_what_nothing_would_read():
    with pytest.raises(BadInput, match=r"shapes='a\.json' without model"):
        TeacherSection(shapes="a.json")
    with pytest.raises(BadInput, match=r"options.layers=\[3\]; allowed: none, but layers beside options"):
        ConvertSection(layers=(1,), options={"rank": 8, "layers": [3]})
    with pytest.raises(BadInput, match=f"calibration_tokens=1000000000; .* of at most {MOST_CALIBRATION}$"):
        ConvertSection(calibration_tokens=10**9)


def test_layers_of_no_conversion_are_refused():
    source = abstract_model(tiny.CONFIG, jnp.float32)
    with pytest.raises(BadInput, match=r"convert.layers=\[77\] of recipe 'none'; allowed: \"all\""):
        student_shapes(job(convert=ConvertSection("none", layers=(77,))), source)
    assert student_shapes(job(), source) is source


def test_policies_are_judged_on_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    made = job(data=DataSection(train=(str(tmp_path / "a.txt"),)), output=str(tmp_path / "run"))
    check_paths(made)
    check_paths(replace(made, evaluate=EvaluateSection(policies=())))
    with pytest.raises(BadInput, match=r"evaluate.policies=\['knorm\(4\)'\] without data.held_out; allowed: none, or"):
        check_paths(replace(made, evaluate=EvaluateSection(policies=("knorm(4)",))))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers=2; allowed: 4, as 'model' itself"),
        ({"hidden_size": 32, "vocab_size": 9}, "hidden_size=32; allowed: 64"),
        ({"max_position_embeddings": 64}, "max_position_embeddings=64; allowed: 4096"),
        ({"architectures": ["Qwen3ForCausalLM"]}, r"architectures=\['Qwen3ForCausalLM'\]; allowed: \['Llama"),
        ({"head_dim": None, "rms_norm_eps": 1e-6}, None),  # unknown in one of them; and nothing is checked by it
    ],
)
def test_shapes_are_those_of_the_model(tmp_path, monkeypatch, changes, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.json").write_text(json.dumps({**tiny.CONFIG, **changes}))
    if sentence is None:
        check_config("shapes.json", "model", tiny.CONFIG, "shapes")
        return
    with pytest.raises(BadInput, match=f"teacher.shapes='shapes.json' has {sentence}"):
        check_config("shapes.json", "model", tiny.CONFIG, "teacher.shapes")


@pytest.fixture
def source(tmp_path):
    """A job whose model lies on disk, with its shapes."""
    model = tiny.model(vocab_size=98, num_hidden_layers=1)
    kvx.save(model, letters(), tmp_path / "model")
    (tmp_path / "a.txt").write_text("text")
    data = DataSection(train=(str(tmp_path / "a.txt"),), sequence=16)
    return job(model=str(tmp_path / "model"), data=data), model


def test_what_checks_a_job_is_compared_with_its_checkpoints(source, tmp_path):
    made, model = source
    (tmp_path / "own.json").write_text((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "other.json").write_text('{"num_hidden_layers": 30}')
    own, other = str(tmp_path / "own.json"), str(tmp_path / "other.json")
    read_material(replace(made, shapes=own, teacher=TeacherSection(made.model, own)), model)
    for changes in ({"shapes": other}, {"teacher": TeacherSection(made.model, other)}):
        with pytest.raises(BadInput, match=r"shapes='.*other\.json' has num_hidden_layers=30; allowed: 1, as "):
            read_material(replace(made, **changes), model)


def test_tokens_of_little_text_are_counted_and_those_of_much_are_not_known(source, tmp_path):
    made, model = source
    assert read_material(made, model).tokens() == len("text") + 2  # its begin and its end
    np.save(tmp_path / "b.npy", np.arange(9, dtype=np.uint16))
    both = replace(made.data, train=(*made.data.train, str(tmp_path / "b.npy")))
    assert read_material(replace(made, data=both), model).tokens() == len("text") + 2 + 9
    (tmp_path / "a.txt").write_text("a" * (COUNTED + 1))
    assert read_material(made, model).tokens() is None


def test_documents_end_with_a_token_that_there_is(source):
    made, model = source
    with pytest.raises(BadInput, match=r"data\.document_end=98; allowed: 0 to 97, the vocabulary"):
        read_material(replace(made, data=replace(made.data, document_end=98)), model)
    read_material(replace(made, data=replace(made.data, document_end=97)), model)
