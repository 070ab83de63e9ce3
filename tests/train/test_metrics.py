"""Claims about a run's numbers: the file continues after a kill, and the arithmetic behind MFU."""

import json

import numpy as np
import pytest
from rich.console import Console

from kvx.train.flops import forward_flops, training_flops
from kvx.train.metrics import FILE, SPEED, Metrics, read
from tests import tiny


def metrics(folder, **changes):
    return Metrics(folder, 10, 128, console=Console(quiet=True), tensorboard=False, **changes)


def test_a_resumed_file_keeps_what_came_before_and_drops_what_is_done_again(tmp_path):
    first = metrics(tmp_path).open(0)
    for step in range(1, 6):
        first.step(step, {"loss": float(np.float32(1 / step))})
    first.evaluation(4, {"held_out": 2.0})
    first.close()
    with open(tmp_path / FILE, "a") as stream:
        stream.write('{"step": 6, "lo')  # as a kill leaves it
    second = metrics(tmp_path).open(4)
    second.step(5, {"loss": 0.5})
    second.close()
    lines = read(tmp_path / FILE)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert np.float32(lines[2]["loss"]) == np.float32(1 / 3) and lines[-1]["loss"] == 0.5
    assert [line for line in lines if "held_out" in line] == [{"step": 4, "held_out": 2.0}]


@pytest.mark.parametrize("peak", [None, 1e6])
def test_every_line_but_the_first_says_how_fast_it_was_and_mfu_where_the_peak_is_known(tmp_path, peak):
    run = metrics(tmp_path, flops=3.0, peak=peak).open(0)
    for step in (1, 2, 3):
        run.step(step, {"loss": 1.0})
    run.evaluation(3, {"held_out": 2.0})
    run.close()
    first, *others, judged = read(tmp_path / FILE)
    assert not {*first, *judged} & {*SPEED}
    for line in others:
        assert line["tokens_per_second"] > 0
        assert line.get("mfu") == (None if peak is None else pytest.approx(line["tokens_per_second"] * 3e-6))


def test_a_run_that_begins_anew_begins_its_file_anew(tmp_path):
    for _ in range(2):
        run = metrics(tmp_path).open(0)
        run.step(1, {"loss": 1.0})
        run.close()
    assert len(read(tmp_path / FILE)) == 1


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    run = Metrics(tmp_path, 10, 128, console=Console(quiet=True)).open(0)
    for step in (1, 2):
        run.step(step, {"loss": 1.0})
    run.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes() and b"tokens_per_second" in events.read_bytes()
    assert b"mfu" not in events.read_bytes(), "no peak is known"


def test_where_there_is_no_terminal_lines_are_printed_at_round_steps(tmp_path, capsys):
    run = Metrics(tmp_path, 30, 128, console=Console(force_terminal=False), tensorboard=False).open(0)
    for step in range(1, 31):
        run.step(step, {"loss": 1.0})
    run.close()
    printed = [line.split("/")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == [f"step {step}" for step in (1, 2, 5, 10, 20, 30)]
    assert json.loads((tmp_path / FILE).read_text().splitlines()[-1])["tokens_seen"] == 30 * 128


def test_flops_are_two_for_every_weight_and_token_and_attention_on_top():
    """Of the tiny Llama: qkv 64 x (4 + 2 + 2) x 32, out 4 x 32 x 64, MLP 3 x 64 x 96, and the tied table 97 x 64."""
    model, length = tiny.model(), 10
    weights = 2 * (4 * (64 * 8 * 32 + 128 * 64 + 3 * 64 * 96) + 97 * 64)
    attention = 4 * 2 * 4 * (32 + 32) * length / 2
    assert forward_flops(model, length) == (weights + attention, weights)
    assert training_flops(model, 1.0, None, length) == 3 * (weights + attention)
    frozen = training_flops(model, 0.0, model, length)
    assert frozen == 2 * weights + 3 * attention + (weights + attention)
