"""Times of compiled calls on this device, and what its memory can do: a copy is the yardstick."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

RUNS = 7
"""Timed runs; the median counts."""

RUN = 0.03
"""Seconds that a run should last: calls are issued one after the other and waited for once, so that what it costs to
issue a call is hidden behind the one before."""

ROTATED = 256 * 2**20
"""Inputs smaller than this are taken in turns, so that none is found in the device's cache."""


def seconds_per_call(program: Callable[[Any], Any], inputs: Sequence[Any], budget: float = 3.0) -> float:
    """Median time of a call.

    Args:
        program: compiled, of one input.
        inputs: of equal shapes, taken in turns.
        budget: seconds to spend, about.
    """
    jax.block_until_ready([program(each) for each in inputs])
    start = time.perf_counter()
    jax.block_until_ready(program(inputs[0]))
    once = time.perf_counter() - start
    count = max(1, min(200, int(RUN / max(once, 1e-6))))
    runs = max(3, min(RUNS, int(budget / max(once * count, 1e-6))))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        outs = [program(inputs[turn % len(inputs)]) for turn in range(count)]
        jax.block_until_ready(outs[-1])
        times.append((time.perf_counter() - start) / count)
        del outs
    return statistics.median(times)


def turns(argument_bytes: int) -> int:
    """How many inputs of this size to take in turns."""
    return max(1, min(8, -(-ROTATED // max(argument_bytes, 1))))


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes per second of a copy on this device, read and written bytes counted."""
    words = jnp.arange(size // 4, dtype=jnp.uint32)
    forms = (jax.jit(jnp.copy), jax.jit(lambda x: x ^ jnp.uint32(1)))
    return 2 * size / min(seconds_per_call(form, [words]) for form in forms)
