"""Claims about plans: the cache is the one that would be made, limits hold on both sides, tables and JSON say all."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

import kvx
from kvx.errors import BadInput
from kvx.eval.cost.cache_bytes import CacheBytes
from kvx.eval.plan import tables
from kvx.eval.plan.check import Checked
from kvx.eval.plan.chips import GIB, Chip, find_chip
from kvx.eval.plan.planning import Job, Planner
from kvx.eval.plan.roofline import Machine, step_seconds, users
from kvx.generate import full_policy
from tests.tiny import CONFIG as TINY

CONFIG = {**TINY, "max_position_embeddings": 1024, "num_hidden_layers": 2}

SNAP = "snapkv(budget=64, window=8)"
A100 = Chip("A100", 312e12, 80 * GIB, 2.039e12, 20e9)
LARGE = {
    **CONFIG,
    "vocab_size": 64000,
    "hidden_size": 7168,
    "intermediate_size": 20178,  # of 20480, so that the weights are the example's 68 GB
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 200_000,
    "tie_word_embeddings": False,
}
"""The 34B model of the cost model's paper."""


@pytest.fixture
def config(tmp_path):
    """Writes a config.json and gives its path."""

    def written(entries, name="model.json"):
        (tmp_path / name).write_text(json.dumps(entries))
        return str(tmp_path / name)

    return written


def tight(planner, policy, rows):
    """The planner's machine with memory for exactly so many rows' caches."""
    load = planner.load(policy, planner.job.context)
    return Machine(replace(planner.job.machine.chip, memory=load.weights + load.cache(rows)))


@pytest.mark.parametrize("chip", ["H100", "v5e"])
def test_a_plan_of_a_tiny_model(config, chip):
    job = Job(config(CONFIG), Machine(find_chip(chip)), 256, 4, answer=16)
    planner = Planner(job)
    full, snap = planner.plans([full_policy(), kvx.parse_policy(SNAP)])
    assert full.cache == CacheBytes.of(planner.prefill(full_policy(), 256, 4).cache).total
    # 2 layers, 4 rows, 2 heads, a bucket of 256 and one of 128 after it, 32 channels in bfloat16, keys and values.
    assert full.cache - full.metadata == 2 * 4 * 2 * (256 + 128) * 32 * 2 * 2
    assert snap.cache < full.cache and full.share == 1 and snap.share == snap.cache / full.cache
    assert snap.largest_batch > full.largest_batch and snap.step_seconds < full.step_seconds
    assert snap.switch_seconds < full.switch_seconds and snap.prefill_seconds == full.prefill_seconds
    assert full.fits and full.largest_context == 1024 - 128 and full.limited
    assert full.peak > full.weights + full.resident
    # Tiles pad what a TPU holds; elsewhere a chip holds the arrays as they are, but for what is not on the device.
    assert (full.resident == full.cache) == (chip == "H100") and full.resident >= full.cache


def test_the_largest_batch_and_context_are_those_that_fit(config):
    job = Job(config(CONFIG), Machine(find_chip("v5e")), 256, 4, answer=16)
    planner, policy = Planner(job), full_policy()
    seven = tight(planner, policy, 7)
    assert users(planner.load(policy, 256), seven) == 7
    assert users(planner.load(policy, 256), Machine(replace(seven.chip, memory=seven.chip.memory - 1))) == 6
    # Memory for four rows of 256 tokens: the same batch does not fit at the next step of lengths.
    planner.job = replace(job, machine=tight(planner, policy, 4))
    weights = planner.load(policy, 256).weights
    assert planner.largest_context(policy, weights) == (256, False)
    planner.job = replace(job, machine=Machine(replace(seven.chip, memory=weights)))
    assert planner.largest_context(policy, weights) == (0, False)


def test_the_34b_example_from_its_shapes(config):
    job = Job(config(LARGE), Machine(A100), 49_152, answer=128)
    planner = Planner(job)
    load = planner.load(full_policy(), job.context)
    assert load.weights == pytest.approx(68e9, rel=0.001)
    kv = 2 * 60 * 8 * 128 * (49_152 + 128) * 2
    # Positions add 4 bytes to a slot's 512.
    assert load.cache(1) == pytest.approx(kv, rel=0.01) and load.cache(1) > kv
    # Of the two tables, 1.3 % of the parameters each, one is looked up and one is for the last token alone.
    flops = 2 * (34e9 - 2 * 64_000 * 7168) * 49_152 + 2 * 60 * 56 * 128 * 49_152**2
    assert load.prompt == pytest.approx(flops, rel=0.01)
    assert step_seconds(load, job.machine) == pytest.approx((68e9 + kv) / 2.039e12, rel=0.015)
    assert users(load, job.machine) == 1


def test_longer_prompts_never_cost_less(config):
    planner = Planner(Job(config(CONFIG), Machine(find_chip("v4")), 256, 2, answer=16))
    for policy in (full_policy(), kvx.parse_policy("snapkv(budget=0.5, window=8)")):
        loads = [planner.load(policy, length) for length in (128, 768)]
        for below, above in pairwise(loads):
            assert below.cache(3) <= above.cache(3) and below.prompt < above.prompt and below.user <= above.user
            assert users(below, planner.job.machine) >= users(above, planner.job.machine)


def test_tables_and_json_hold_every_figure_with_its_formula(config):
    job = Job(config(CONFIG), Machine(find_chip("v6e")), 128, answer=8)
    plans = list(Planner(job).plans([full_policy()]))
    found = json.loads(json.dumps(tables.as_json(job, plans, [])))
    (row,) = found["policies"]
    assert set(row) - {"policy"} == set(found["formulas"]) - set(tables.OPERATIONS)
    assert found["chip"]["memory"] == 32 * GIB and found["ridge"] == pytest.approx(560, rel=0.01)
    shown = tables.plan_table(job, plans)
    assert len(shown.rows) == len(tables.FIGURES) and tables.formula_table(job).row_count > len(tables.FIGURES)


def test_the_compilers_words_stand_beside_the_plans():
    good = Checked("full", "v5e:2x2", 1000, 1010, 5, 2000, 3.0)
    bad = Checked("wide", "v5e:2x2", 1000, 0, 0, None, 3.0, refusal="RESOURCE_EXHAUSTED: 20 GiB")
    console = Console(width=200)
    with console.capture() as shown:
        console.print(tables.check_table([good, bad]))
    assert "-0.99 %" in shown.get() and "does not fit: RESOURCE_EXHAUSTED" in shown.get()
    assert good.as_json()["error"] == pytest.approx(-0.0099, abs=1e-4) and bad.as_json()["error"] is None


def test_sizes_and_durations_read_well():
    assert [tables.size(each) for each in (0, 1023, 1024, 3 * 2**29, 2**50)] == [
        "0 B", "1023 B", "1.00 KiB", "1.50 GiB", "1024.00 TiB",
    ]  # fmt: skip
    assert [tables.duration(each) for each in (12.34, 0.0123, 1.23e-5)] == ["12.3 s", "12.3 ms", "12.3 us"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context": 0}, "context=0"),
        ({"batch": 0}, "batch=0"),
        ({"answer": 0}, "answer=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"users": 0}, "users=0"),
        ({"machine": Machine(A100, 0)}, "chips=0"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"model": "nothing.json"}, "cannot be read"),
        ({"model": "smollm2-135m-instruc"}, "did you mean"),
    ],
)
def test_what_cannot_be_planned_is_refused(config, change, words):
    given = {"model": config(CONFIG), "machine": Machine(A100), "context": 128}
    with pytest.raises(BadInput, match=words):
        Planner(Job(**(given | change)))
