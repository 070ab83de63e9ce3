"""Shapes of latent decode attention: small ones with every option, and those of DeepSeek's and of converted models.

Tolerances: in float32, rounding of two matmuls over at most 1024 terms. In bfloat16 the inputs are the reference's and
products are exact, but the softmax weights are rounded to 8 bits before they meet the rows: each is off by up to 2^-9,
the output by less than 2^-8 of the largest row and by about as much of itself where few slots dominate.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kvx.kernels.arg_spec import ArgSpec
from kvx.kernels.latent_decode_attention.operands import CodedRows
from kvx.kernels.quantize_pack.coded import TokenCodes, joined_ranges

EXACT, ROUNDED = 2e-5, 1.5e-2


def _build(
    key: jax.Array,
    *,
    batch: int,
    heads: int,
    length: int,
    slots: int,
    latent: int,
    rotary: int,
    dtype: Any,
    run: int | None,
    slots_last: bool,
    places: str,
    bias: bool,
) -> dict[str, Any]:
    """Inputs; places: "in order" (no array), or "holes" (a random order with empty slots, the first row empty)."""
    keys = iter(jax.random.split(key, 8))
    dim = rotary + latent

    def turned(*shape, make):
        return make(next(keys), (shape[0], shape[2], shape[1]) if slots_last else shape)

    normal = partial(jax.random.normal, dtype=dtype)
    if run is None:
        rows: Any = turned(batch, slots, dim, make=normal)
    else:
        # Steps of 2^-7 from about -1: numbers of the size of the others.
        rows = CodedRows(
            rotary=turned(batch, slots, rotary, make=normal),
            codes=TokenCodes(
                jax.random.bits(next(keys), (batch, 1, latent // 4, slots), jnp.uint32),
                _ranges(next(keys), (batch, 1, latent // run, slots)),
                bits=8,
            ),
        )
    last = jnp.full((batch,), slots - 1) if places == "in order" else jnp.full((batch,), slots)
    if bias and places == "in order":
        # Ragged rows, of which the first sees nothing and the last one slot.
        last = jax.random.randint(next(keys), (batch,), 0, slots).at[0].set(-1).at[-1].set(0)
    found = {
        "queries": normal(next(keys), (batch, length, heads, dim)),
        "rows": rows,
        "query_positions": jnp.where(last[:, None] < 0, -1, last[:, None] + jnp.arange(1 - length, 1)),
    }
    if places == "holes":
        order = jax.vmap(lambda key: jax.random.permutation(key, slots))(jax.random.split(next(keys), batch))
        filled = (jax.random.uniform(next(keys), (batch, slots)) < 0.7) & (jnp.arange(batch) > 0)[:, None]
        found["key_positions"] = jnp.where(filled, order, -1).astype(jnp.int32)
    if bias:
        found["bias"] = jax.random.normal(next(keys), (batch, slots))
    return found


def _ranges(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    scale, minimum = jax.random.uniform(key, (2, *shape), minval=0.5, maxval=1.0)
    return joined_ranges((scale * 2**-7).astype(jnp.bfloat16), (-minimum).astype(jnp.bfloat16))


def _spec(
    name: str,
    heads: int,
    latent: int,
    rotary: int,
    batch: int,
    slots: int,
    *,
    length: int = 1,
    dtype: Any = jnp.bfloat16,
    run: int | None = None,
    slots_last: bool = False,
    places: str = "in order",
    bias: bool = False,
    **options: Any,
) -> ArgSpec:
    parts = [name, f"h{heads} {latent}+{rotary} b{batch} {slots}", jnp.dtype(dtype).name if run is None else "int8"]
    parts += [f"t{length}"] if length > 1 else []
    parts += [
        word for word, there in (("slots last", slots_last), ("holes", places == "holes"), ("bias", bias)) if there
    ]
    build = partial(
        _build,
        batch=batch,
        heads=heads,
        length=length,
        slots=slots,
        latent=latent,
        rotary=rotary,
        dtype=dtype,
        run=run,
        slots_last=slots_last,
        places=places,
        bias=bias,
    )
    known = {"value_dim": latent, "scale": (latent + rotary) ** -0.5, "slots_last": slots_last}
    return ArgSpec(" ".join(parts), build, known | options, EXACT if dtype == jnp.float32 else ROUNDED)


FLOAT = jnp.float32

NUMERIC = (
    _spec("small", 9, 16, 32, 3, 96, dtype=FLOAT, length=2, places="holes"),
    _spec("small", 9, 16, 32, 3, 256, dtype=FLOAT, slots_last=True, bias=True),
    _spec("one slot", 4, 32, 16, 2, 1, dtype=FLOAT),
    _spec("one slot", 4, 32, 16, 2, 1, dtype=FLOAT, slots_last=True, places="holes"),
    _spec("window", 8, 64, 32, 2, 200, dtype=FLOAT, length=3, window=50, softcap=5.0),
    _spec("window", 8, 64, 32, 2, 384, slots_last=True, length=3, places="holes", window=50, softcap=5.0),
    _spec("odd width", 6, 48, 24, 2, 130, dtype=FLOAT, places="holes", bias=True),
    _spec("deepseek-lite", 16, 512, 64, 2, 1024),
    _spec("deepseek", 128, 512, 64, 2, 512, slots_last=True, places="holes"),
    _spec("deepseek-lite", 16, 512, 64, 3, 640, run=128, bias=True),
    _spec("deepseek-lite", 16, 512, 64, 3, 640, run=128, slots_last=True, bias=True),
    _spec("converted", 32, 64, 32, 2, 384, dtype=FLOAT, run=32, slots_last=True, places="holes"),
    _spec("converted", 32, 64, 32, 2, 384, dtype=FLOAT, run=64, length=4),
    _spec("converted", 9, 16, 32, 3, 256, run=16, slots_last=True, length=2, bias=True),
)

MODELS = (("deepseek-v3", 128, 512, 64), ("deepseek-v2-lite", 16, 512, 64))
CONVERTED = (("smollm2-135m", 9, 16, 32), ("llama-3.2-1b", 32, 64, 32))
SIZES = tuple((batch, slots) for batch in (1, 8, 64) for slots in (4096, 32768))

AOT = (
    *(_spec(*model, *size, slots_last=True) for model in (*MODELS, *CONVERTED) for size in SIZES),
    *(_spec(*model, *size, run=128, slots_last=True) for model in MODELS for size in SIZES),
    *(_spec(*CONVERTED[1], *size, run=64, slots_last=True) for size in SIZES),
    *(_spec(*CONVERTED[0], *size, run=16, slots_last=True) for size in SIZES),
)

CI = (_spec(*MODELS[0], 8, 32768, slots_last=True), _spec(*MODELS[1], 8, 4096, run=128, slots_last=True))

GPU = tuple(_spec(*model, *size) for model in (*MODELS, *CONVERTED) for size in SIZES)
"""Slots first, which a GPU copies ahead along whole rows. A TPU would pad every row to whole runs of 128 lanes."""
