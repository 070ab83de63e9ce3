"""Claims about decode steps compiled by the real TPU compiler, without a TPU, for a Llama-3.1-8B shape on v5e:2x2.

Four layers by default; all 32 (marked slow) also by hand: `python -m tests.kvx.decode_step_for_v5e --layers 32`.
"""

import fcntl
import json
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install kvx[aot]"),
]
STEPS = ["full", "snapkv"]
LAYERS = [4, pytest.param(32, marks=pytest.mark.slow)]
ROOT = Path(__file__).parents[2]
GIB = 2**30
KEYS_ON_CHIP = 8 * 2 * 4096 * 128
"""Entries of one layer's keys that a chip holds: rows, its KV heads, slots, head dim."""


@cache
def reports(layers: int, *programs: str) -> dict[str, dict]:
    """Compiled in a process of its own, one at a time on this machine: libtpu allows one holder."""
    command = [sys.executable, "-m", "tests.kvx.decode_step_for_v5e", "--layers", str(layers), *programs]
    with open(Path(tempfile.gettempdir()) / "kvx-libtpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return {line["program"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("step", STEPS)
def test_a_decode_step_moves_activations_between_chips_and_never_the_cache(step, layers):
    collectives = reports(layers, *STEPS)[step]["collectives"]
    # Two sums a layer (after attention and after the MLP), one for the embedding that is split by vocabulary.
    assert {kind: found["count"] for kind, found in collectives.items()} == {"all-reduce": 2 * layers + 1}
    assert collectives["all-reduce"]["largest"] == 8 * 4096


def test_the_count_finds_the_gathers_of_a_step_that_wants_the_whole_cache_on_every_chip():
    collectives = reports(1, "gathering")["gathering"]["collectives"]
    assert max(found["largest"] for found in collectives.values()) >= 4 * KEYS_ON_CHIP


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("step", STEPS)
def test_a_decode_step_writes_into_the_donated_cache_and_fits_the_chip(step, layers):
    found = reports(layers, *STEPS)[step]
    assert found["alias_bytes"] >= found["cache_bytes"] >= 2 * 2 * KEYS_ON_CHIP * layers
    # A copy of one layer's keys on a chip would be 16 MiB; what is there holds activations and the logits' partials.
    in_use = found["argument_bytes"] + found["output_bytes"] - found["alias_bytes"] + found["temporary_bytes"]
    assert found["temporary_bytes"] < 0.0625 * GIB
    assert in_use < 16 * GIB


NARROW = ("quest", "adakv", "paged", "streaming", "kivi")


@pytest.mark.parametrize("step", ["narrow", *(pytest.param(f"narrow {n}", marks=pytest.mark.slow) for n in NARROW)])
def test_heads_that_do_not_fill_lanes_are_written_and_read_without_a_copy_of_the_cache(step):
    found = reports(1, step)[step]
    assert found["collectives"].pop("all-reduce")["count"] == 3
    # Of pages, which chip holds whose; a chip's share of the keys has 4 million entries.
    assert all(each["largest"] <= 8192 for each in found["collectives"].values())
    # A narrow key is half as many entries, of two bytes; a coded one is an eighth of that.
    assert found["alias_bytes"] >= found["cache_bytes"] >= KEYS_ON_CHIP * (2 if step != "narrow kivi" else 0.25)
    # Keys in padded lanes would be 8 MiB.
    assert found["temporary_bytes"] < 2**20


def test_a_prefill_attends_by_kernels_on_every_chip_and_gathers_no_tokens():
    """Two sums a layer and what the policy's choice exchanges, numbers by token; keys would be 128 times as many."""
    collectives = reports(1, "prefill")["prefill"]["collectives"]
    assert all(each["largest"] <= 8 * 8 * 1024 for kind, each in collectives.items() if kind != "all-reduce")
    assert collectives["all-reduce"]["largest"] == 8 * 1024 * 4096


def test_values_on_the_host_stay_there_and_a_step_moves_no_more_than_it_fetches():
    """ShadowKV over 32768 tokens: a gather by the host inside the loop over missing chunks, as the TPU compiles it."""
    found = reports(1, "shadowkv")["shadowkv"]
    # 4092 chunks less 48 outliers; 8 rows, 2 heads a chip, 8 tokens, 128 channels, bfloat16.
    assert found["host_bytes"] == 8 * 2 * (4092 - 48) * 8 * 128 * 2
    assert found["host_argument_bytes"] == found["host_alias_bytes"] == found["host_bytes"]
    assert found["host_temporary_bytes"] == 0
    # Values on the device would be 126 MiB a layer and chip, all factors turned around 131 MiB.
    assert found["temporary_bytes"] < 8 * 2**20
    # One sum more than a dense step: how many turns the loop takes is the same on every chip.
    assert {kind: each["count"] for kind, each in found["collectives"].items()} == {"all-reduce": 4}
    assert found["collectives"]["all-reduce"]["largest"] == 8 * 4096
