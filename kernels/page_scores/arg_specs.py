"""Calls of the page scores: small ones for numerics, real models' for compilation and the benchmark.

Tolerances: products are exact in float32 and bfloat16 alike, sums of 2 D of them in float32: 1e-5 of the largest score.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvx.kernels.arg_spec import ArgSpec
from kvx.kernels.ragged_decode_attention.arg_specs import MODELS, WIDE

TOLERANCE = 1e-5


def bounded(
    batch: int, model: tuple[int, int, int], pages: int, dtype: Any, new: int = 1
) -> Callable[[jax.Array], dict[str, Any]]:
    """Bounds of random keys; the last page in eight is empty."""
    heads, group, dim = model

    def build(key: jax.Array) -> dict[str, jax.Array]:
        middle = jax.random.normal(key, (batch, heads, pages, dim))
        width = jax.random.exponential(key, middle.shape)
        empty = (jnp.arange(pages) >= pages - pages // 8)[:, None]
        bounds = (jnp.where(empty, jnp.inf, middle - width), jnp.where(empty, -jnp.inf, middle + width))
        queries = jax.random.normal(jax.random.fold_in(key, 1), (batch, heads, group, new, dim), dtype)
        return {"queries": queries, "bounds": jnp.concatenate(bounds, axis=-1).astype(dtype)}

    return build


def _call(model: str, batch: int, slots: int, page: int) -> ArgSpec:
    build = bounded(batch, (MODELS | WIDE)[model], slots // page, jnp.bfloat16)
    return ArgSpec(f"{model} b{batch} {slots} pages of {page}", build, {}, TOLERANCE)


NUMERIC = (
    ArgSpec("3 query heads", bounded(2, (3, 3, 64), 40, jnp.float32), {}, TOLERANCE),
    ArgSpec("mean", bounded(2, (2, 4, 128), 300, jnp.float32), {"group": "mean"}, TOLERANCE),
    ArgSpec("bfloat16", bounded(2, (2, 7, 128), 130, jnp.bfloat16), {}, TOLERANCE),
    ArgSpec("MQA, D 256, 3 queries", bounded(2, (1, 8, 256), 64, jnp.bfloat16, new=3), {"group": "mean"}, TOLERANCE),
    ArgSpec("one page", bounded(1, (2, 1, 64), 1, jnp.float32), {}, TOLERANCE),
)

AOT = tuple(
    _call(model, batch, slots, page)
    for model in MODELS | WIDE
    for batch in (1, 8, 64)
    for slots in (4096, 32768)
    for page in (16, 64)
)

CI = (_call("llama-3-8b", 8, 32768, 16), _call("smollm2-135m", 1, 4096, 64))
