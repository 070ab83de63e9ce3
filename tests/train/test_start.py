"""Claims about the student as a run begins: its conversion is told in bytes of the model that will be saved."""

import io
import json

import pytest
from rich.console import Console

from kvx.train.data import Documents, Encoding
from kvx.train.job import ConvertSection, Job
from kvx.train.material import Material
from kvx.train.stage import StageSection
from kvx.train.start import start
from tests import tiny
from tests.train.letters import letters


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_the_report_is_kept_in_the_run_s_folder_in_the_saved_dtype(tmp_path, dtype, size):
    convert = ConvertSection(layers=(1,), options={"rank": 16, "rotary": 16})
    job = Job("a", "m", (StageSection(steps=1),), str(tmp_path), saved_dtype=dtype, convert=convert)
    console = Console(file=io.StringIO(), width=120)
    source, nothing = tiny.model(), Documents(())
    material = Material(job, letters(), Encoding.of(letters()), nothing, nothing, (), ())
    student, facts = start(source, material, False, console)
    told = facts["conversion"]
    assert json.loads((tmp_path / "conversion.json").read_text()) == told
    grouped, count = source.blocks[0].spec, len(source.blocks)
    one = 2 * grouped.kv_heads * grouped.key_dim
    assert told["dtype"] == dtype and told["before"] == size * count * one
    assert told["after"] == size * ((count - 1) * one + 32)
    assert [layer["rank"] for layer in told["layers"]] == [None, 16, *[None] * (count - 2)]
    assert told["layers"][1]["after"] == size * 32 and 0 < told["layers"][1]["kept"] < 1
    assert f"{dtype} bytes before" in console.file.getvalue() and student.blocks[1].spec.latent
