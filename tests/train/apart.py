"""Processes of their own for tests: several that share a run, or one that is killed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 300
"""What a run may take: a tiny one needs twenty, most of them to compile."""


def start_processes(arguments, processes=1, devices=1):
    """Several processes (Gloo between them) of one program, each with so many simulated devices."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    shared = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    if processes * devices > 1:  # as `kvx.compilation_cache` says
        shared |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    own = [{}]
    if processes > 1:
        shared |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
        own = [{"JAX_PROCESS_ID": str(index)} for index in range(processes)]
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, cwd=ROOT, env=shared | each, **pipes) for each in own]


def ended(runs):
    """What the first of some processes printed, all of which came to a clean end; none outlives the test."""
    try:
        outputs = [run.communicate(timeout=SECONDS) for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, (_, error) in zip(runs, outputs, strict=True):
        assert run.returncode == 0, error
    return outputs[0][0]


def free_port():
    """Of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
