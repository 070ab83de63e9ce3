"""Calls of the sparse read: small ones for numerics, real models' for compilation and the benchmark.

Tolerances are those of the ragged read, for its reasons. Bytes that must move are those chosen, with their positions,
queries, indices and results.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvx.kernels.arg_spec import ArgSpec
from kvx.kernels.ragged_decode_attention.arg_specs import MODELS, TOLERANCE, WIDE, operands


def sparse(
    batch: int,
    model: tuple[int, int, int],
    slots: int,
    page: int,
    count: int,
    dtype: Any,
    *,
    joined: bool = False,
    new: int = 1,
    sets: int = 1,
    each: bool = False,
    short: int = 0,
) -> Callable[[jax.Array], dict[str, Any]]:
    """A dense cache of which `count` distinct pages are chosen, up to `short` fewer; the newest slot in eight empty."""
    heads, group, dim = model
    spread = new if each else 1

    def build(key: jax.Array) -> dict[str, Any]:
        arrays = operands(key, (batch, heads, group, new, dim), (batch, heads, slots), dim, joined, dtype)
        shape = (batch, heads, sets, spread)
        # The best by a random score are distinct, and in random order.
        chosen = jax.lax.top_k(jax.random.uniform(key, (*shape, slots // page)), count)[1]
        fewer = jax.random.randint(key, (*shape, 1), count - short, count + 1)
        held = slots - slots // 8
        return arrays | {
            "query_positions": jnp.broadcast_to(held - new + jnp.arange(new), (batch, new)),
            "key_positions": jnp.broadcast_to(
                jnp.where(jnp.arange(slots) < held, jnp.arange(slots), -1), (batch, heads, slots)
            ),
            "chosen": jnp.where(jnp.arange(count) < fewer, chosen, -1),
        }

    return build


def _call(model: str, batch: int, slots: int, page: int, budget: int) -> ArgSpec:
    heads, group, dim = (MODELS | WIDE)[model]
    count = budget // page
    # A choice by query head where slots are chosen singly (TidalDecode), else by KV head (Quest).
    sets = group if page == 1 else 1
    build = sparse(batch, (MODELS | WIDE)[model], slots, page, count, jnp.bfloat16, joined=dim % 128 != 0, sets=sets)
    read = batch * heads * sets * count * (page * (2 * dim * 2 + 4) + 4)
    asked = batch * heads * group * (2 * dim + 4 * dim + 4)
    name = f"{model} b{batch} {slots} {budget} in {'single slots' if page == 1 else f'pages of {page}'}"
    return ArgSpec(name, build, {"page": page, "scale": dim**-0.5}, TOLERANCE[jnp.bfloat16], moved=read + asked)


def _small(name: str, build: Callable[[jax.Array], dict[str, Any]], dtype: Any, page: int, **options: Any) -> ArgSpec:
    return ArgSpec(name, build, {"page": page, "scale": 0.1, **options}, TOLERANCE[dtype])


F32, BF16 = jnp.float32, jnp.bfloat16

NUMERIC = (
    _small("pages of 16, 3 query heads", sparse(2, (3, 3, 64), 128, 16, 4, F32, joined=True, short=3), F32, 16),
    _small("pages of 16, bfloat16", sparse(2, (2, 4, 128), 1024, 16, 40, BF16, short=20), BF16, 16),
    _small("pages of 64, MQA, D 256", sparse(3, (1, 8, 256), 512, 64, 3, BF16), BF16, 64),
    _small("pages of 16, none chosen", sparse(2, (2, 1, 128), 64, 16, 2, F32, short=2), F32, 16),
    _small("a choice by head and query", sparse(2, (2, 4, 128), 256, 16, 5, F32, new=3, sets=4, each=True), F32, 16),
    _small("of two heads", sparse(1, (2, 4, 128), 256, 8, 9, F32, new=2, sets=2), F32, 8, window=150, softcap=3.0),
    _small("single slots", sparse(2, (2, 4, 128), 256, 1, 37, F32, new=2, sets=4, each=True, short=9), F32, 1),
    _small("single slots, bfloat16", sparse(2, (3, 3, 64), 512, 1, 100, BF16), BF16, 1),
)  # fmt: skip

AOT = tuple(
    _call(model, batch, slots, page, budget)
    for model in MODELS | WIDE
    for batch in (1, 8, 64)
    for slots, budget in ((4096, 512), (32768, 2048))
    for page in (16, 64)
)

GPU = tuple(
    _call(model, batch, slots, 1, budget)
    for model in MODELS
    for batch in (1, 8)
    for slots, budget in ((4096, 512), (32768, 2048))
)
"""Slots chosen one by one: for a GPU. A TPU addresses whole tiles of slots, so that there XLA gathers them."""

CI = (_call("llama-3-8b", 8, 32768, 16, 2048), _call("smollm2-135m", 1, 4096, 64, 512))
