"""Shapes of the Walsh-Hadamard transform: small ones, and whole caches of keys.

Tolerances: in float32, sums of at most 256 terms. In bfloat16 the sums are exact to float32 and the result is rounded
once, by up to 2^-9 of itself; the reference rounds the same sums, so that the two differ by one unit in the last place.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kvx.kernels.arg_spec import ArgSpec


def _build(key: jax.Array, *, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    return {"x": jax.random.normal(key, shape, dtype)}


def _spec(name: str, *shape: int, dtype: Any = jnp.bfloat16, axis: int = -1) -> ArgSpec:
    label = " ".join((name, "x".join(map(str, shape)), jnp.dtype(dtype).name, *(["slots last"] if axis == -2 else [])))
    return ArgSpec(
        label, partial(_build, shape=shape, dtype=dtype), {"axis": axis}, 2e-5 if dtype == jnp.float32 else 8e-3
    )


def _cache(name: str, kv_heads: int, dim: int, batch: int, slots: int) -> ArgSpec:
    """Heads of 64 have their slots last, as on a TPU they must."""
    label = f"{name} b{batch} {slots}"
    if dim < 128:
        return _spec(label, batch, kv_heads, dim, slots, axis=-2)
    return _spec(label, batch, kv_heads, slots, dim)


NUMERIC = (
    _spec("small", 1, 64, dtype=jnp.float32),
    _spec("small", 2, 3, 50, 128, dtype=jnp.float32),
    _spec("small", 2, 3, 64, 50, dtype=jnp.float32, axis=-2),
    _spec("small", 2, 16, 256),
    _spec("small", 2, 256, 130, axis=-2),
    _spec("small", 4, 2, 200, 128),
)

SIZES = tuple((batch, slots) for batch in (1, 8, 64) for slots in (4096, 32768))

AOT = (
    *(_cache("llama-3-8b", 8, 128, *size) for size in SIZES),
    *(_cache("llama-3.2-1b", 8, 64, *size) for size in SIZES),
    *(_cache("gemma-3-4b", 4, 256, *size) for size in SIZES),
)

CI = (_cache("llama-3-8b", 8, 128, 8, 4096), _cache("llama-3.2-1b", 8, 64, 8, 4096))
