"""Claims about runs that end early: killed, told to stop, or diverging, and what a resumed run then does."""

import math
import signal
import time

import jax
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.train.interruption import Interruption
from kvx.train.loop import Diverged
from kvx.train.metrics import FILE, SPEED, read
from tests.train.apart import ended, start_processes
from tests.train.tiny_runs import Cliff, Squares, mesh, one_device, trainer

STEPS = 24


def losses(folder):
    """Every step's numbers, but how fast it was."""
    lines = [line for line in read(folder / FILE) if "loss" in line or "held_out" in line]
    return [{name: number for name, number in line.items() if name not in SPEED} for line in lines]


def process(folder, *options):
    """A run in a process of its own."""
    return start_processes(["-m", "tests.train.tiny_runs", folder, STEPS, *options])[0]


def until(condition, run, seconds=180):
    """Wait for a condition while a process runs."""
    end = time.monotonic() + seconds
    while not condition() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert condition(), run.communicate()


def written(folder):
    return len(losses(folder)) if (folder / FILE).exists() else 0


def test_a_run_that_stopped_goes_on_bit_for_bit_and_also_on_another_mesh(tmp_path):
    """Stopped by its time limit after the first step; then resumed on one device, and on eight to rounding."""
    whole = trainer(tmp_path / "whole", 8, placement=one_device()).run()
    assert whole.finished and whole.step == 8
    halves = trainer(tmp_path / "halves", 8, placement=one_device())
    halves.stop = Interruption(0.0)
    first = halves.run()
    assert not first.finished and first.step == 1
    second = trainer(tmp_path / "halves", 8, placement=one_device())
    second.steps = 8
    outcome = second.run(resume=True)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    same = jax.tree.map(np.array_equal, whole.student, outcome.student)
    assert all(jax.tree.leaves(same))
    again = trainer(tmp_path / "whole", 8, placement=mesh(data=4, tensor=2)).run(resume=True)
    assert again.step == 8 and again.held_out == whole.held_out


def test_a_signal_in_the_last_step_is_told_too(tmp_path):
    """It comes while the last checkpoint is written: the stage is over, and what would follow it must not begin."""
    run = trainer(tmp_path, 2, placement=one_device(), minimised=Squares())
    save = run.checkpoints.save

    def told(*arguments):
        signal.raise_signal(signal.SIGTERM)
        save(*arguments)

    run.checkpoints.save = told
    before = signal.getsignal(signal.SIGTERM)
    outcome = run.run()
    assert outcome.finished and outcome.stopped and outcome.step == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_interruptions_may_be_entered_within_themselves_and_only_the_outermost_ends_listening():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as stop:
        with stop:
            pass
        signal.raise_signal(signal.SIGTERM)
        assert stop.told and stop.over and stop.after(3)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_new_run_does_not_write_over_checkpoints(tmp_path):
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000004" / "manifest.json").write_text("")
    with pytest.raises(BadInput, match="holds checkpoints; allowed: resume=True, or another folder"):
        trainer(tmp_path, 8, placement=one_device()).run()


@pytest.mark.parametrize("every, good", [(1, 2), (2, 2), (3, None)])
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path, every, good):
    """Weights are 0.1 higher after every step: the third step's are still numbers, but no loss can be had of them."""
    rate = {"learning_rate": 0.1, "warmup": 0, "schedule": "constant"}
    run = trainer(tmp_path, 40, placement=one_device(), every=every, keep=1, evaluate=False, minimised=Cliff(), **rate)
    kept = "none" if good is None else f"step {good} in"
    with pytest.raises(Diverged, match=f"loss=nan at step 4; allowed: a finite number; the last good .* is {kept}"):
        run.run()
    assert run.checkpoints.steps() == ([] if good is None else [good])


def test_a_held_out_loss_that_is_not_finite_stops_the_run_before_its_weights_are_kept(tmp_path):
    run = trainer(tmp_path, 4, placement=one_device(), every=1, minimised=Squares())
    judged = iter([1.0, math.inf])
    run.judge.student = lambda arrays: next(judged)
    with pytest.raises(Diverged, match=r"held_out=inf at step 2; .* last good checkpoint is step 1 in"):
        run.run()
    assert run.checkpoints.steps() == [1]


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_bit_for_bit(tmp_path):
    """kill -9 at five moments, some of them while a checkpoint is being written; every line equals the whole run's."""
    ended([process(tmp_path / "whole", "every=3")])
    random = np.random.default_rng(0)
    for _ in range(5):
        before = written(tmp_path / "killed")
        run = process(tmp_path / "killed", "every=3", "seconds=0.05")
        until(lambda seen=before: written(tmp_path / "killed") > min(seen, STEPS - 4) + 1, run)
        time.sleep(random.uniform(0, 0.5))
        run.kill()
        run.communicate()
    assert "finished True" in ended([process(tmp_path / "killed", "every=3")])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_ends_cleanly(tmp_path):
    run = process(tmp_path, "every=1000", "seconds=0.1")
    until(lambda: written(tmp_path) > 3, run)
    run.send_signal(signal.SIGTERM)
    out = ended([run])
    step = int(out.split("stopped at ")[1].split(",")[0])
    assert "finished False" in out and 3 < step < STEPS
    assert (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    ended([process(tmp_path, "every=1000")])
    assert [line["step"] for line in losses(tmp_path) if "loss" in line] == list(range(1, STEPS + 1))
