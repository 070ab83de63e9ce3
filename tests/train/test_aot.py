"""Claims about compilation for TPU pods without one: the paper's job on Llama-3.2-1B fits 256 chips of v5e."""

import fcntl
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvx.errors import BadInput
from kvx.train.aot import GIB, Compiled, compile_job
from kvx.train.collectives import Traffic
from kvx.train.job_file import read_job
from kvx.train.shapes import model_shapes
from tests.tiny import CONFIG

ROOT = Path(__file__).parents[2]
LAYERS = 16
TINY = """
name = "tiny"
model = "no weights"
shapes = "shapes.json"
[convert]
recipe = "transmla"
options = { rank = 48, rotary = 16, fold = 2 }
[data]
train = ["none"]
sequence = 128
pairs = { train = ["none"], sequence = 64, prompt = 32 }
[[stages]]
steps = 3
[[stages]]
kind = "dpo"
steps = 3
[mesh]
data = 1
fsdp = 2
tensor = 2
"""


JOB = ROOT / "configs" / "xecomla_llama32_1b.toml"

needs_compiler = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install kvx[aot]")


def compiled(*arguments):
    """What `python -m tests.train.test_aot` printed, a process of its own: libtpu allows one holder on a machine."""
    with open(Path(tempfile.gettempdir()) / "kvx-libtpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "tests.train.test_aot", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.aot
@needs_compiler
def test_the_step_of_xecomla_llama32_1b_compiles_for_256_chips_and_fits():
    """The repository's own job, which needs no weights."""
    found = compiled(str(JOB), "v5e:16x16", "0")
    assert found["fits"] and found["chips"] == 256 and found["mesh"]["fsdp"] == 32 and found["mesh"]["tensor"] == 8
    # Weights and two moments in float32 of 1.2e9 parameters, a teacher of 8e9 in bfloat16; some of it on every chip.
    assert (12 * 1.2e9 + 2 * 8e9) / 256 < found["arguments"] < 2 * (12 * 1.2e9 + 2 * 8e9) / 256
    # Every layer's weights are gathered as it runs, forwards and backwards, in student and teacher.
    assert found["collectives"]["all-gather"]["count"] >= 3 * LAYERS
    # ... to this chip's eighth of the heads and hidden units: at least the student's twice, in bfloat16.
    assert found["collectives"]["all-gather"]["bytes"] > 2 * 2 * 0.9e9 / 8
    assert found["aliased"] > 0.9 * found["outputs"]


@pytest.mark.slow
@pytest.mark.aot
@needs_compiler
@pytest.mark.parametrize("stage", ["0", "1"])
def test_both_kinds_of_stage_compile_ahead_of_time(tmp_path, stage):
    """A tiny model with another recipe, distilled and then taught preferences, on four chips."""
    (tmp_path / "shapes.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 2}))
    (tmp_path / "job.toml").write_text(TINY)
    found = compiled(str(tmp_path / "job.toml"), "v5e:2x2", stage)
    assert found["fits"] and found["chips"] == 4 and found["aliased"] > 0
    assert found["collectives"]["all-gather"]["bytes"] > 0


def test_what_a_chip_needs_decides_whether_it_fits():
    one = Compiled(
        "v5e:2x2", 4, {"data": 4}, 3 * GIB, 2 * GIB, 2 * GIB, 12 * GIB, {"all-reduce": Traffic(2, 8)}, 16 * GIB, 1.0
    )
    assert one.needed == 15 * GIB and one.fits
    assert not Compiled("v5e:2x2", 4, {}, 0, 0, 0, 0, {}, 16 * GIB, 1.0, refusal="too large").fits
    assert one.as_json()["collectives"] == {"all-reduce": {"count": 2, "bytes": 8}}


@pytest.mark.parametrize(
    ("topology", "sentence"),
    [("v9:2x2", "unknown chip 'v9': "), ("v5e:large", "topology='v5e:large'; allowed: chip:shape, as v5e:16x16")],
)
def test_topologies_that_no_one_has_are_refused(topology, sentence):
    with pytest.raises(BadInput, match=sentence):
        compile_job(read_job(JOB), topology)


def test_ranks_that_weights_tell_are_refused_and_not_guessed():
    with pytest.raises(BadInput, match="has ranks that are known once its weights are"):
        model_shapes(read_job(JOB, ["convert.options.energy=0.95"]))


if __name__ == "__main__":
    path, topology, stage = sys.argv[1:]
    print(json.dumps(compile_job(read_job(Path(path)), topology, int(stage)).as_json()))
