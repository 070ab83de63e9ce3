"""Implementations against the float32 reference, on the device at hand."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvx.eval.bench_kernels.calls import Call, implementations


@dataclass(frozen=True)
class Checked:
    """One implementation on one call.

    Attributes:
        error: largest difference from the reference, relative to each output's largest finite value. Where the
            reference is infinite (an empty row's log-sum-exp) the implementation must be too, else this is inf.
        allowed: the call's tolerance.
        problem: why it could not run.
    """

    call: str
    implementation: str
    error: float
    allowed: float
    problem: str | None = None

    @property
    def good(self) -> bool:
        """Whether it ran, and differs by no more than is allowed."""
        return self.error <= self.allowed


def check(calls: Sequence[Call], chosen: tuple[str, ...], seed: int = 0) -> Iterator[Checked]:
    """Every call with every chosen implementation that its operation has; programs are compiled by all processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = []
        for call in calls:
            names = [name for name in implementations(call.operation) if name in chosen]
            programs = [(name, pool.submit(_compiled, call, name)) for name in names]
            work.append((call, programs, pool.submit(_compiled, call, "reference")))
        for call, programs, reference in work:
            arrays = call.arrays(seed)
            for name, program in programs:
                try:
                    error, problem = _error(reference.result()(arrays), program.result()(arrays)), None
                except Exception as failure:  # one call that fails must not take the others with it
                    error, problem = float("inf"), (str(failure).strip().splitlines() or [type(failure).__name__])[0]
                yield Checked(str(call), name, error, call.spec.tolerance, problem and problem[:300])


def error(call: Call, implementation: str, seed: int = 0, **more: Any) -> float:
    """`Checked.error` of one implementation on one call, with more arguments of its own such as `tuning`."""
    arrays = call.arrays(seed)
    return _error(_compiled(call, "reference")(arrays), _compiled(call, implementation, **more)(arrays))


def _compiled(call: Call, implementation: str, **more: Any) -> Any:
    precision = "highest" if implementation == "reference" else None
    with jax.default_matmul_precision(precision):
        function, shapes = call.bound(implementation, **more)
        return jax.jit(function).lower(shapes).compile()


def _error(wanted: Any, found: Any) -> float:
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
    return max((_difference(*pair) for pair in pairs), default=0.0)


def _difference(wanted: jax.Array, found: jax.Array) -> float:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return float("inf")
    if not jnp.issubdtype(wanted.dtype, jnp.floating):
        return float(np.mean(np.asarray(wanted) != np.asarray(found)))
    expected, got = (np.asarray(array.astype(jnp.float32), np.float64) for array in (wanted, found))
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], got[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf")
    top = np.abs(expected[finite]).max(initial=0.0)
    return float(np.abs(expected[finite] - got[finite]).max(initial=0.0) / (top or 1.0))
