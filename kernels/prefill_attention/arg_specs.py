"""Shapes of prefill attention: small ones with every mask and statistic, and those of the models in use.

Tolerances: in float32, rounding of products of up to 256 terms and of sums over up to 700 keys. In bfloat16 the inputs
are the reference's and products are exact, but probabilities are rounded to 8 bits before they meet the values, and the
output once more: 2^-8 of the largest value. Statistics are sums of float32 probabilities, off by their logits' 1e-5.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvx.kernels.arg_spec import ArgSpec
from kvx.kernels.logits import SHARED
from kvx.kernels.prefill_attention.columns import MAX, SQUARE, SUM, Column

EXACT, ROUNDED = 3e-5, 1e-2
EVERY = (
    *(SUM, SQUARE, MAX, Column(power=2, pooled=True), Column(near=0.3), Column(reduce="max", pooled=True)),
    *(Column(last=0.2, rise=1.2), Column(power=2, reduce="max", last=0.4, rise=2.0)),
    Column(power=2, reduce="max", pooled=True, near=0.6, last=0.7, rise=1.5),
)
"""Every kind of statistic: each field departs from its default, and every two of them in one statistic."""


def _build(
    key: jax.Array,
    *,
    batch: int,
    kv_heads: int,
    group: int,
    length: int,
    past: int,
    dim: int,
    dtype: Any,
    ragged: bool = False,
    documents: int = 0,
    value_dim: int | None = None,
) -> dict[str, Any]:
    """Inputs.

    Args:
        past: earlier keys, a fifth of their slots empty, another fifth for each head.
        ragged: rows of different lengths, the first full, the last a single token (nothing, of four rows or more).
        documents: labels of so many documents, behind a shared prefix; 0: none.
        value_dim: None: as wide as the keys.
    """
    keys = iter(jax.random.split(key, 6))
    shape = (batch, kv_heads, past + length, dim)
    index = jnp.arange(length, dtype=jnp.int32)
    lengths = jnp.full((batch,), length, jnp.int32)
    if ragged:
        lengths = jax.random.randint(next(keys), (batch,), 1, length + 1).at[-1].set(0 if batch > 3 else 1)
        lengths = lengths.at[0].set(length)
    new = jnp.where(index < lengths[:, None], past + index, -1)
    kept = jax.random.bernoulli(next(keys), 0.8, (batch, kv_heads, past))
    old = jnp.where(kept, jnp.arange(past, dtype=jnp.int32), -1)
    spread = jnp.broadcast_to(new[:, None], (batch, kv_heads, length))
    found: dict[str, Any] = {
        "queries": jax.random.normal(next(keys), (batch, kv_heads, group, length, dim), dtype),
        "keys": jax.random.normal(next(keys), shape, dtype),
        "values": jax.random.normal(next(keys), (*shape[:3], value_dim or dim), dtype),
        "query_positions": new,
        "key_positions": jnp.concatenate([old, spread], axis=-1),
        "lengths": past + lengths,
    }
    if documents:
        cut = index * (documents + 1) // length
        labels = jnp.broadcast_to(jnp.where(cut == 0, SHARED, cut), (batch, length))
        before = jnp.full((batch, past), SHARED, jnp.int32)
        found["segments"] = (labels, jnp.concatenate([before, labels], axis=1))
    return found


def small(name: str, shape: tuple[int, int, int, int, int, int], dtype: Any, **more: Any) -> ArgSpec:
    """A shape (batch, KV heads, group, length, past, head dim)."""
    batch, kv_heads, group, length, past, dim = shape
    inputs = {name: more.pop(name) for name in ("ragged", "documents", "value_dim") if name in more}
    build = partial(
        _build, batch=batch, kv_heads=kv_heads, group=group, length=length, past=past, dim=dim, dtype=dtype, **inputs
    )
    kind = "f32" if dtype == jnp.float32 else "bf16"
    options = {"scale": dim**-0.5, "columns": EVERY} | more
    return ArgSpec(f"{name} {kind}", build, options, EXACT if dtype == jnp.float32 else ROUNDED)


NUMERIC = tuple(
    small(name, shape, dtype, **more)
    for dtype in (jnp.float32, jnp.bfloat16)
    for name, shape, more in (
        ("causal d64", (1, 2, 3, 256, 0, 64), {}),
        ("mqa d128 odd length", (2, 1, 4, 333, 0, 128), {"ragged": True}),
        ("d256 one head", (1, 1, 1, 200, 0, 256), {}),
        ("window and cap d128", (2, 2, 2, 384, 0, 128), {"window": 100, "softcap": 5.0, "ragged": True}),
        ("documents d64", (2, 2, 1, 512, 0, 64), {"documents": 3}),
        ("after past slots d64", (1, 2, 3, 130, 200, 64), {"ragged": True}),
        ("length 1", (2, 2, 2, 1, 0, 64), {}),
        ("an empty row", (4, 1, 2, 150, 0, 128), {"ragged": True}),
        ("column mass only", (1, 2, 2, 640, 0, 64), {"columns": (SUM,)}),
    )
)


MODELS: Mapping[str, tuple[int, int, int, dict[str, Any]]] = {
    "llama-3-8b": (8, 4, 128, {}),
    "llama-3.2-1b": (8, 4, 64, {}),
    "qwen2.5-7b": (4, 7, 128, {}),
    "gemma-3-4b local": (4, 2, 256, {"window": 1024}),
    "gemma-2-2b": (4, 2, 256, {"softcap": 50.0}),
    "smollm2-135m": (3, 3, 64, {}),
}
"""KV heads, query heads for each, head dim, masking."""


STATISTICS = (
    ("pooled squares", (Column(power=2, pooled=True),)),
    ("near", (Column(near=0.3),)),
    ("last", (Column(last=0.2, rise=1.2),)),
    ("every statistic", EVERY),
)
"""What policies ask for beside a mass: `kvx.parts` knows them as scores, profiles and thinning."""


def _model(
    model: str, batch: int, length: int, columns: tuple[Column, ...], kind: str, past: int = 0, documents: int = 0
) -> ArgSpec:
    kv_heads, group, dim, masking = MODELS[model]
    build = partial(
        _build, batch=batch, kv_heads=kv_heads, group=group, length=length, past=past, dim=dim, dtype=jnp.bfloat16,
        documents=documents,
    )  # fmt: skip
    # What dense attention of others can be asked, the statistics apart.
    compares = {"B": batch, "H": kv_heads * group, "G": kv_heads, "T": length, "S": length, "D": dim, "causal": True}
    return ArgSpec(
        f"{model} b{batch} {length} {kind}",
        build,
        {"scale": float(np.float32(dim**-0.5)), "columns": columns, **masking},
        ROUNDED,
        compares=None if masking or past or documents else compares,
    )


AOT = (
    *(
        _model(model, batch, length, columns, kind)
        for model in MODELS
        for batch, length in ((1, 4096), (8, 4096), (1, 32768), (8, 32768))
        for kind, columns in (("plain", ()), ("mass", (SUM,)))
    ),
    *(
        spec
        for model in ("llama-3-8b", "gemma-3-4b local", "smollm2-135m")
        for spec in (
            *(_model(model, 8, 4096, columns, kind) for kind, columns in STATISTICS),
            _model(model, 8, 4096, (SUM,), "mass of documents", documents=7),
            _model(model, 1, 4096, (SUM,), "mass after 28672 slots", past=28672),
        )
    ),
)

CI = tuple(spec for spec in AOT if spec.name in ("llama-3-8b b1 4096 mass", "smollm2-135m b1 32768 mass"))
