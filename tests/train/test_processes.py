"""Claims about several processes: two that share a run do what one does, and either goes on where the other stopped."""

import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.train.metrics import FILE, read
from kvx.train.processes import agreed, join_processes
from tests.train.apart import ended, start_processes

STEPS = 12


def run_of(folder, steps, processes, devices):
    """The tiny run."""
    return ended(start_processes(["-m", "tests.train.tiny_runs", folder, steps], processes, devices))


def curve(folder):
    lines = read(folder / FILE)
    return np.array([line["loss"] for line in lines if "loss" in line])


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one_and_their_checkpoints_serve_it(tmp_path):
    """2 processes x 2 devices against 1 x 1: float32 sums in another order."""
    run_of(tmp_path / "one", STEPS, 1, 1)
    out = run_of(tmp_path / "two", STEPS, 2, 2)
    assert f"stopped at {STEPS}, finished True" in out
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), atol=1e-4)
    assert len(curve(tmp_path / "two")) == STEPS
    run_of(tmp_path / "two", STEPS + 4, 1, 1)
    run_of(tmp_path / "one", STEPS + 4, 2, 2)
    assert len(curve(tmp_path / "two")) == len(curve(tmp_path / "one")) == STEPS + 4
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), atol=1e-4)


def test_processes_are_joined_by_all_three_facts_or_by_none(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    join_processes()
    with pytest.raises(BadInput, match="processes=2, process=None; allowed: all three, or none"):
        join_processes("127.0.0.1:1", 2)
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(BadInput, match="JAX_PROCESS_ID='first'; allowed: an integer"):
        join_processes()


def test_alone_a_check_is_its_own_answer():
    def refused():
        raise BadInput("no")

    assert agreed(lambda: 7, "elsewhere") == 7
    with pytest.raises(BadInput, match="no"):
        agreed(refused, "elsewhere")
