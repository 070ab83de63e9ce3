"""Implementations against the float32 reference, on the device at hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvx.eval.kernel_bench.calls import Call


def error(call: Call, implementation: str, seed: int = 0, **more: Any) -> float:
    """Largest difference from the reference, relative to each output's largest finite value.

    Where the reference is infinite (an empty row's log-sum-exp) the implementation must be too, else the error is inf.
    """
    arrays = call.spec.arrays(seed)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(call.bound("reference"))(arrays)
    found = jax.jit(call.bound(implementation, **more))(arrays)
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
    return max((_difference(*pair) for pair in pairs), default=0.0)


def _difference(wanted: jax.Array, found: jax.Array) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    if not jnp.issubdtype(wanted.dtype, jnp.floating):
        return float(np.mean(np.asarray(wanted) != np.asarray(found)))
    expected, got = (np.asarray(array.astype(jnp.float32), np.float64) for array in (wanted, found))
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], got[~finite]) or not np.isfinite(got[finite]).all():
        return float("inf")
    top = np.abs(expected[finite]).max(initial=0.0)
    return float(np.abs(expected - got)[finite].max(initial=0.0) / (top or 1.0))
