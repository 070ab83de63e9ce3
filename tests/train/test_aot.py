"""Claims about compilation for TPU pods without one: the paper's job on Llama-3.2-1B fits 256 chips of v5e."""

import fcntl
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvx.errors import BadInput
from kvx.train.aot import GIB, Compiled, compile_job
from kvx.train.collectives import Traffic
from kvx.train.job import ConvertSection, DataSection, Job, MeshSection, StageSection
from kvx.train.shapes import model_shapes

ROOT = Path(__file__).parents[2]
LLAMA_1B = str(ROOT / "configs" / "models" / "llama-3.2-1b.json")
LAYERS = 16


def job(**mesh):
    """X-EcoMLA's shape for Llama-3.2-1B: rank 64, rotary 32, query rank 1424; 192 rows of 2048 tokens a step."""
    return Job(
        "llama",
        "llama-3.2-1b",
        (StageSection(tokens=7_000_000_000, batch=192),),
        shapes=LLAMA_1B,
        convert=ConvertSection(options={"rank": 64, "rotary": 32, "query_rank": 1424}),
        data=DataSection(sequence=2048),
        mesh=MeshSection(**mesh),
    )


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.long
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install kvx[aot]")
def test_the_step_of_xecomla_llama32_1b_compiles_for_256_chips_and_fits():
    """In a process of its own: libtpu allows one holder on a machine."""
    with open(Path(tempfile.gettempdir()) / "kvx-libtpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-m", "tests.train.test_aot"], cwd=ROOT, capture_output=True, text=True, timeout=1800
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and found["chips"] == 256 and found["mesh"]["fsdp"] == 64
    # Weights, two moments in float32 and the teacher in bfloat16, of 1.2e9 parameters each, over 256 chips.
    assert 14 * 1.2e9 / 256 < found["arguments"] < 14 * 1.4e9 / 256
    # Every layer's weights are gathered as it runs, forwards and backwards, in student and teacher.
    assert found["collectives"]["all-gather"]["count"] >= 3 * LAYERS
    assert found["aliased"] > 0.9 * found["outputs"]


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
        compile_job(job(), topology)


def test_ranks_that_weights_tell_are_refused_and_not_guessed():
    convert = ConvertSection(options={"rank": 64, "rotary": 32, "energy": 0.95})
    with pytest.raises(BadInput, match="has ranks that are known once its weights are"):
        model_shapes(replace(job(), convert=convert))


if __name__ == "__main__":
    print(json.dumps(compile_job(job(data=1, fsdp=64, tensor=4), "v5e:16x16").as_json()))
