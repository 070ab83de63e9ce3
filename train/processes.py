"""The processes that make up a run: how they join, wait for each other, and hear what the first one found."""

import os
from collections.abc import Callable

import jax
import numpy as np

from kvx.errors import BadInput

PATIENCE = 7 * 24 * 3600
"""Seconds that processes which are done wait for the first one, which still saves and judges."""

_REFUSED = -2


def join_processes(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes of a run; alone if neither arguments nor environment name any.

    Args:
        coordinator: address:port of process 0; None: JAX_COORDINATOR_ADDRESS of the environment.
        processes: their number; None: JAX_NUM_PROCESSES.
        process: which this is; None: JAX_PROCESS_ID. Where a cluster's own environment says all three (TPU pods,
            Slurm), coordinator="auto" is enough.

    Raises:
        BadInput: some of the three without the others.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("NUM_PROCESSES") if processes is None else processes
    process = _number("PROCESS_ID") if process is None else process
    if coordinator is None and processes is None and process is None:
        return
    if coordinator == "auto":
        # JAX reads the same variable, and would take the word for an address.
        os.environ.pop("JAX_COORDINATOR_ADDRESS", None)
        jax.distributed.initialize(shutdown_timeout_seconds=PATIENCE)
        return
    if coordinator is None or processes is None or process is None:
        raise BadInput(
            f"coordinator={coordinator}, processes={processes}, process={process}; allowed: all three, or none of them"
        )
    jax.distributed.initialize(coordinator, processes, process, shutdown_timeout_seconds=PATIENCE)


def meet(what: str) -> None:
    """Wait until every process is here.

    Args:
        what: is true then; the same words on every process.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def agreed(check: Callable[[], int], elsewhere: str) -> int:
    """What the first process finds, on every process, so that none goes on where another refuses.

    Args:
        check: asked of the first process alone; a number of at least -1.
        elsewhere: what the others say if the first one refuses.

    Raises:
        BadInput: the first process's refusal.
    """
    found, refusal = 0, None
    if jax.process_index() == 0:
        try:
            found = check()
        except BadInput as error:
            refusal = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        found = int(multihost_utils.broadcast_one_to_all(np.int32(_REFUSED if refusal else found)))
        if found == _REFUSED and refusal is None:
            raise BadInput(elsewhere)
    if refusal is not None:
        raise refusal
    return found


def _number(variable: str) -> int | None:
    text = os.environ.get(f"JAX_{variable}")
    if text is None:
        return None
    if not text.isdigit():
        raise BadInput(f"JAX_{variable}={text!r}; allowed: an integer of at least 0")
    return int(text)
