"""Calls of the ragged and the paged read: small ones for numerics, real models' for compilation and the benchmark.

Tolerances: float32 differs from the reference by the order of its sums, 2e-5 of the largest output; with bfloat16 the
softmax weights are rounded to bfloat16 before they meet the values, 2^-9 each, which no average raises: 8e-3 allows two
such roundings.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvx.kernels.arg_spec import ArgSpec

MODELS = {
    "llama-3-8b": (8, 4, 128),
    "llama-3.2-1b": (8, 4, 64),
    "qwen2.5-7b": (4, 7, 128),
    "smollm2-135m": (3, 3, 64),
}
"""KV heads, query heads a KV head, head dim."""

WIDE = {"gemma-3-4b": (4, 2, 256)}
"""The same of heads wider than lanes."""

TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 8e-3}


def operands(
    key: jax.Array, queries: tuple[int, ...], slots: tuple[int, ...], value_dim: int, joined: bool, dtype: Any
) -> dict[str, Any]:
    """Random queries, and keys and values for so many slots; `joined` in one row each."""
    ask, hold, pay = jax.random.split(key, 3)
    keys = jax.random.normal(hold, (*slots, queries[-1]), dtype)
    values = jax.random.normal(pay, (*slots, value_dim), dtype)
    return {
        "queries": jax.random.normal(ask, queries, dtype),
        "keys": jnp.concatenate([keys, values], axis=-1) if joined else keys,
        "values": None if joined else values,
    }


def uneven(key: jax.Array, batch: int, heads: int, total: int) -> jax.Array:
    """Lengths (B, G) that add up to `total` in every row: shares of an exponential draw, as AdaKV's heads differ."""
    share = jax.random.exponential(key, (batch, heads)) + 0.05
    edges = jnp.floor(jnp.cumsum(share, axis=1) / jnp.sum(share, axis=1, keepdims=True) * (total + 0.5))
    return jnp.diff(edges.astype(jnp.int32), axis=1, prepend=0)


def ragged(
    batch: int, model: tuple[int, int, int], slots: int, dtype: Any, joined: bool = False, new: int = 0
) -> Callable[[jax.Array], dict[str, Any]]:
    """Heads of different length, `slots` on average; with `new` queries at true positions, else one that sees all."""
    heads, group, dim = model

    def build(key: jax.Array) -> dict[str, Any]:
        total = heads * slots
        lengths = uneven(key, batch, heads, total)
        arrays = operands(key, (batch, heads, group, max(new, 1), dim), (batch, total), dim, joined, dtype)
        arrays |= {"starts": jnp.cumsum(lengths, axis=1) - lengths, "lengths": lengths}
        if new:
            # A slot in eight is empty, and the first query sees all but the newest tokens.
            positions = jax.random.randint(key, (batch, total), -(total // 8), total)
            arrays["key_positions"] = jnp.maximum(positions, -1)
            arrays["query_positions"] = jnp.broadcast_to(total - new + jnp.arange(new), (batch, new))
        return arrays

    return build


def paged(
    batch: int, model: tuple[int, int, int], slots: int, page: int, dtype: Any, joined: bool = False, new: int = 0
) -> Callable[[jax.Array], dict[str, Any]]:
    """Heads of the same number of pages, in random order in the pool; the last one not full."""
    heads, group, dim = model
    pages = -(-slots // page)

    def build(key: jax.Array) -> dict[str, Any]:
        total = batch * heads * pages
        arrays = operands(key, (batch, heads, group, max(new, 1), dim), (total, page), dim, joined, dtype)
        table = jax.random.permutation(key, total).astype(jnp.int32).reshape(batch, heads, pages)
        short = jax.random.randint(key, (batch, heads), 0, page)
        arrays |= {"table": table, "lengths": jnp.maximum(slots - short, 0)}
        if new:
            place = jnp.zeros((total, page), jnp.int32).at[table].set(jnp.arange(pages * page).reshape(pages, page))
            arrays["key_positions"] = place.reshape(-1)
            arrays["query_positions"] = jnp.broadcast_to(slots - page - new + jnp.arange(new), (batch, new))
        return arrays

    return build


def _call(model: str, batch: int, slots: int, page: int | None, new: int = 0, **options: Any) -> ArgSpec:
    """One token, all slots of a run seen; or as stores call, with true positions of `new` tokens."""
    shape = (MODELS | WIDE)[model]
    heads, group, dim = shape
    dtype, joined = BF16, dim % 128 != 0
    if page is None:
        build = ragged(batch, shape, slots, dtype, joined, new)
    else:
        build = paged(batch, shape, slots, page, dtype, joined, new)
    kind = "runs" if page is None else f"pages of {page}"
    return ArgSpec(
        f"{model} b{batch} {slots} {kind}{' by positions' if new else ''}{' window' if 'window' in options else ''}",
        build,
        {"scale": dim**-0.5, **options},
        TOLERANCE[dtype],
        function=None if page is None else "paged_decode_attention",
        compares=None
        if new
        else {"B": batch, "H": heads * group, "G": heads, "T": 1, "S": slots, "D": dim, "causal": False},
    )


def _small(name: str, build: Callable[[jax.Array], dict[str, Any]], dtype: Any, pages: bool, **options: Any) -> ArgSpec:
    function = "paged_decode_attention" if pages else None
    return ArgSpec(name, build, {"scale": 0.1, **options}, TOLERANCE[dtype], function=function)


F32, BF16 = jnp.float32, jnp.bfloat16

NUMERIC = (
    _small("runs, 3 query heads", ragged(2, (3, 3, 64), 52, F32, joined=True), F32, False),
    _small("runs, D 128", ragged(2, (2, 4, 128), 300, F32), F32, False),
    _small("runs, bfloat16, D 128", ragged(2, (4, 7, 128), 700, BF16), BF16, False, longest=2000),
    _small("runs, 4 queries", ragged(2, (2, 2, 128), 200, F32, new=4), F32, False),
    _small("runs, window and softcap", ragged(1, (2, 1, 128), 200, F32, new=1), F32, False, window=100, softcap=5.0),
    _small("run, MQA, D 256", ragged(3, (1, 8, 256), 528, BF16), BF16, False),
    _small("pages of 16, 3 query heads", paged(2, (3, 3, 64), 70, 16, F32, joined=True), F32, True),
    _small("pages of 64, bfloat16", paged(2, (2, 4, 128), 1000, 64, BF16), BF16, True),
    _small("pages of 16, 4 queries", paged(2, (2, 2, 128), 200, 16, F32, new=4), F32, True),
    _small("pages, window and softcap", paged(1, (2, 1, 128), 700, 16, F32, new=1), F32, True, window=99, softcap=5.0),
    _small("pages of 256, window", paged(1, (2, 2, 128), 600, 256, F32, new=2), F32, True, window=99),
    _small("pages, MQA, D 256, length 1", paged(2, (1, 1, 256), 16, 16, BF16), BF16, True),
)

SIZES = tuple((batch, slots, page) for batch in (1, 8, 64) for slots in (4096, 32768) for page in (None, 16, 64))

AOT = (
    *(_call(model, *size) for model in MODELS for size in SIZES),
    *(_call(model, *size, new=1) for model in MODELS | WIDE for size in SIZES),
    *(_call("gemma-3-4b", 8, 32768, page, new=1, window=1024) for page in (None, 16)),
)

CI = (
    _call("llama-3-8b", 8, 32768, None, new=1),
    _call("llama-3.2-1b", 8, 4096, 16, new=1),
)
