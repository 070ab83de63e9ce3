"""Claims about the TPU compiler: it counts the bytes that a plan says, and a chip without one is refused."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvx.errors import BadInput
from kvx.eval.plan.check import topology_of
from kvx.eval.plan.chips import find_chip

ROOT = Path(__file__).parents[3]
POLICIES = ("full", "snapkv(budget=0.25)+kivi(bits=2)")
SMOLLM = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
"""SmolLM2-135M."""


def test_topologies_are_the_smallest_that_have_the_chips():
    assert topology_of(find_chip("v5e"), 1) == topology_of(find_chip("v5e"), 4) == "v5e:2x2"
    assert topology_of(find_chip("v5p"), 5) == "v5p:2x2x2"
    with pytest.raises(BadInput, match="chips=65"):
        topology_of(find_chip("v5e"), 65)
    with pytest.raises(BadInput, match="H100"):
        topology_of(find_chip("H100"), 1)


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install kvx[aot]")
def test_the_compiler_counts_what_the_plan_says(tmp_path):
    """In a process of its own: libtpu stays in it, and shapes there are not checked for being arrays."""
    config = tmp_path / "smollm.json"
    config.write_text(json.dumps(SMOLLM))
    command = [sys.executable, "-m", "tests.eval.plan.test_check", str(config)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with open(Path(tempfile.gettempdir()) / "kvx-libtpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr[-2000:]
    checks = json.loads(ended.stdout.splitlines()[-1])
    assert [each["policy"] for each in checks] == list(POLICIES)
    for each in checks:
        assert each["refusal"] is None
        # A token a row, and vectors in tiles larger than need be, are what is left.
        assert abs(each["error"]) < 0.002, each
        assert each["prefill_peak"] > each["predicted"]


def _main(config: str) -> None:
    import kvx
    from kvx.eval.plan.check import check
    from kvx.eval.plan.planning import Job, Planner
    from kvx.eval.plan.roofline import Machine

    planner = Planner(Job(config, Machine(find_chip("v5e")), 2048, 8))
    print(json.dumps([check(planner, kvx.parse_policy(text)).as_json() for text in POLICIES]))


if __name__ == "__main__":
    _main(sys.argv[1])
