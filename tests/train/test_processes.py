"""Claims about several processes: two that share a run do what one does, and either goes on where the other stopped."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvx.train.metrics import FILE, read

ROOT = Path(__file__).parents[2]
STEPS = 12

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def together(folder, steps, processes, devices):
    """A run of several processes (Gloo between them), each with so many devices; what the first one printed."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    shared = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    if processes > 1:
        shared |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-m", "tests.train.tiny_runs", str(folder), str(steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [
        subprocess.Popen(
            command, cwd=ROOT, env=shared | {"JAX_PROCESS_ID": str(index)} if processes > 1 else shared, **pipes
        )
        for index in range(processes)
    ]
    outputs = [run.communicate(timeout=600) for run in runs]
    for run, (_, error) in zip(runs, outputs, strict=True):
        assert run.returncode == 0, error
    return outputs[0][0]


def curve(folder):
    lines = read(folder / FILE)
    return np.array([line["loss"] for line in lines if "loss" in line])


def test_two_processes_have_the_loss_curve_of_one_and_their_checkpoints_serve_it(tmp_path):
    """2 processes x 2 devices against 1 x 1: float32 sums in another order."""
    together(tmp_path / "one", STEPS, 1, 1)
    out = together(tmp_path / "two", STEPS, 2, 2)
    assert f"stopped at {STEPS}, finished True" in out
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), atol=1e-4)
    assert len(curve(tmp_path / "two")) == STEPS
    together(tmp_path / "two", STEPS + 4, 1, 1)
    together(tmp_path / "one", STEPS + 4, 2, 2)
    assert len(curve(tmp_path / "two")) == len(curve(tmp_path / "one")) == STEPS + 4
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), atol=1e-4)
