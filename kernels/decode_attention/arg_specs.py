"""Calls of decode attention: small ones against the reference, those of real models for compilers and benchmarks.

Tolerances, relative to the reference's largest absolute value. float32: 2e-5, sums of up to 2048 terms in another
order. bfloat16: the weights of a softmax and the scaled queries (or decoded numbers) are rounded to 8 bits before a
product, 2^-9 each at most and half of that on average; a logit of size 8 then moves a weight by 8 * 2^-9. Hence 1e-2,
and 2e-2 where codes' ranges are rounded on the way too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvx.kernels.arg_spec import ArgSpec
from kvx.kernels.decode_attention.operands import Operand, Rows, Tail
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes, joined_ranges

MODELS = {
    "llama-3-8b": (32, 8, 128),
    "llama-3.2-1b": (32, 8, 64),
    "qwen2.5-7b": (28, 4, 128),
    "gemma-3-4b": (8, 4, 256),
    "smollm2-135m": (9, 3, 64),
}
"""Query heads, KV heads, head dim."""

KINDS = ("bf16", "int8", "fp8", "int4", "int2")
"""Caches: full precision, 8 bits with a scale a slot, KIVI's codes."""

EXACT, ROUNDED, CODED = 2e-5, 1e-2, 2e-2


def operand(kind: str, key: jax.Array, shape: tuple[int, int, int, int], group: int, of: str) -> Operand:
    """Random numbers of about unit size by slot.

    Args:
        kind: one of `KINDS`, "f32", or "uint8", codes of 8 bits; with " turned" the slots come last.
        shape: B, G, C, D.
        of: "keys", grouped along slots if coded, or "values"; "slots": codes with a range for each slot.
    """
    name, *turned = kind.split()
    batch, heads, slots, width = shape
    if name in ("uint8", "int4", "int2"):
        bits = int(name[-1])
        word_key, scale_key = jax.random.split(key)
        words = jax.random.bits(word_key, (batch, heads, width * bits // 32, slots), jnp.uint32)
        by_channel = of == "keys"
        where = (batch, heads, slots // group, width) if by_channel else (batch, heads, width // group, slots)
        scale = jax.random.uniform(scale_key, where, jnp.float32, 1.0, 4.0) / 2**bits
        minimum = -scale * (2**bits - 1) / 2
        ranges = joined_ranges(scale.astype(jnp.bfloat16), minimum.astype(jnp.bfloat16))
        return ChannelCodes(words, ranges, bits) if by_channel else TokenCodes(words, ranges, bits)
    laid = (batch, heads, width, slots) if turned else shape
    if name == "int8":
        numbers = jax.random.bits(key, laid, jnp.uint8).astype(jnp.int8)
        return Rows(numbers, jnp.full((batch, heads, 1, slots), 1 / 64, jnp.float32), bool(turned))
    numbers = jax.random.normal(key, laid, jnp.float32 if name == "f32" else jnp.bfloat16)
    if name == "fp8":
        return Rows(numbers.astype(jnp.float8_e4m3fn), jnp.full((batch, heads, 1, 1), 0.9, jnp.float32), bool(turned))
    return Rows(numbers, None, bool(turned))


def positions(shape: tuple[int, int, int]) -> jax.Array:
    """Slots in no order, an eighth empty; of the last row the first head holds one token and the last head none."""
    batch, heads, slots = shape
    assert slots % 13, "so that a stride of 13 meets every slot"
    head = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1)
    order = (jnp.arange(slots, dtype=jnp.int32) * 13 + head * 5) % slots
    order = jnp.where(order % 8 == 3, -1, order)
    if batch > 1:
        order = order.at[-1, 0].set(jnp.where(order[-1, 0] == 0, 0, -1)).at[-1, -1].set(-1)
    return order


def build(
    kind: str,
    shape: tuple[int, int, int, int, int],
    *,
    length: int = 1,
    group: int = 64,
    dtype: Any = jnp.bfloat16,
    masked: str = "lengths",
    tail: int = 0,
    bias: bool = False,
    keys_of: str = "keys",
) -> Callable[[jax.Array], dict[str, Any]]:
    """Arguments of a call.

    Args:
        shape: B, G, R, C, D.
        length: T.
        masked: "lengths", "positions", "both" or "" for neither.
        tail: E.
    """
    batch, heads, group_heads, slots, width = shape

    def arrays(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 8)
        made: dict[str, Any] = {
            "queries": jax.random.normal(keys[0], (batch, heads, group_heads, length, width), dtype),
            "keys": operand(kind, keys[1], (batch, heads, slots, width), group, keys_of),
            "values": operand(kind, keys[2], (batch, heads, slots, width), group, "values"),
        }
        if masked in ("lengths", "both"):
            made["lengths"] = jnp.full((batch, heads), slots, jnp.int32)
            if slots <= 2048:
                # Each head its own; of the first row one holds nothing and another a single token.
                lengths = jax.random.randint(keys[3], (batch, heads), 0, slots + 1)
                made["lengths"] = lengths.at[0, 0].set(0).at[0, -1].set(1)
        if masked in ("positions", "both"):
            made["query_positions"] = jnp.broadcast_to(slots - length + jnp.arange(length), (batch, length))
            made["key_positions"] = positions((batch, heads, slots))
        if bias:
            made["bias"] = jax.random.normal(keys[5], (batch, heads, slots), jnp.float32)
        if tail:
            entries = jax.random.normal(keys[6], (2, batch, heads, tail, width), dtype)
            index = jnp.broadcast_to(jnp.arange(tail, dtype=jnp.int32), (batch, heads, tail))
            spots = jnp.where(index % 5 == 4, -1, slots - tail + index)
            made["tail"] = Tail(entries[0], entries[1], spots)
        return made

    return arrays


def _numeric(
    name: str, *arguments: Any, tolerance: float, options: dict[str, Any] | None = None, **more: Any
) -> ArgSpec:
    width = arguments[1][-1]
    return ArgSpec(name, build(*arguments, **more), {"scale": width**-0.5} | (options or {}), tolerance)


NUMERIC = (
    _numeric("f32 positions", "f32", (2, 2, 1, 300, 64), masked="positions", dtype=jnp.float32, tolerance=EXACT),
    _numeric(
        "f32 run of 3", "f32", (2, 2, 3, 200, 128), masked="positions", length=3, dtype=jnp.float32, tolerance=EXACT
    ),
    _numeric("f32 turned", "f32 turned", (2, 2, 3, 256, 64), masked="both", dtype=jnp.float32, tolerance=EXACT),
    _numeric("f32 codes", "int4", (1, 2, 3, 256, 64), dtype=jnp.float32, tail=20, masked="both", tolerance=5e-5),
    _numeric("bf16 lengths", "bf16", (2, 3, 3, 600, 128), tolerance=ROUNDED),
    _numeric("bf16 mqa", "bf16 turned", (2, 1, 8, 512, 64), masked="both", bias=True, tolerance=ROUNDED),
    _numeric(
        "bf16 window",
        "bf16",
        (2, 2, 2, 1024, 256),
        masked="positions",
        length=4,
        options={"window": 512, "softcap": 20.0},
        tolerance=ROUNDED,
    ),
    _numeric("bf16 all", "bf16", (1, 8, 4, 2048, 128), masked="", tolerance=ROUNDED),
    _numeric("bf16 tail", "bf16", (2, 2, 3, 256, 128), masked="positions", tail=33, tolerance=ROUNDED),
    _numeric("int8", "int8", (2, 8, 4, 700, 128), tolerance=ROUNDED),
    _numeric("int8 turned", "int8 turned", (2, 3, 3, 512, 64), masked="both", length=2, tolerance=ROUNDED),
    _numeric("fp8", "fp8", (2, 2, 4, 384, 128), masked="both", tolerance=ROUNDED),
    _numeric("codes of 8 bits", "uint8", (2, 2, 4, 512, 128), tolerance=CODED),
    _numeric("int4", "int4", (2, 2, 4, 1024, 128), tolerance=CODED),
    _numeric("int2", "int2", (2, 8, 4, 2048, 128), tolerance=CODED),
    _numeric("int2 narrow", "int2", (2, 2, 3, 512, 64), group=32, masked="both", tolerance=CODED),
    _numeric("int4 wide", "int4", (1, 2, 2, 512, 256), group=128, masked="both", bias=True, tolerance=CODED),
    _numeric("int4 tail", "int4", (2, 2, 4, 512, 128), masked="positions", tail=129, tolerance=CODED),
    _numeric("int2 tail", "int2", (1, 1, 3, 640, 64), group=32, length=3, masked="both", tail=33, tolerance=CODED),
    _numeric(
        "f32 probabilities",
        "f32",
        (2, 2, 3, 300, 64),
        masked="both",
        length=2,
        bias=True,
        tail=9,
        dtype=jnp.float32,
        options={"probabilities": True},
        tolerance=EXACT,
    ),
    _numeric(
        "int4 probabilities", "int4", (1, 2, 3, 512, 64), tail=17, options={"probabilities": True}, tolerance=CODED
    ),
    _numeric("bf16 prefix of 8 rows", "bf16", (1, 2, 24, 600, 128), masked="positions", tolerance=ROUNDED),
    _numeric("int4 by slot", "int4", (2, 2, 4, 300, 128), masked="positions", keys_of="slots", tolerance=CODED),
)
"""Empty heads and heads of one token, head dims 64 to 256, 1 to 24 query heads a group, one KV head, T up to 4."""


def _model(model: str, batch: int, slots: int, kind: str, note: str = "", sharing: int = 1, **more: Any) -> ArgSpec:
    """A model's call; sharing: rows that read one prefix as so many more query heads (`shared_prefix_attention`)."""
    heads, kv_heads, width = MODELS[model]
    options = {"scale": width**-0.5} | more.pop("options", {})
    # Head dims below a TPU's 128 lanes lie slots last.
    laid = f"{kind} turned" if width < 128 and kind in ("bf16", "int8", "fp8") else kind
    shape = (batch, kv_heads, sharing * heads // kv_heads, slots, width)
    compares = None
    if kind == "bf16" and not note:
        compares = {"B": batch, "H": heads, "G": kv_heads, "T": 1, "S": slots, "D": width, "causal": False}
    name = f"{model} b{batch} {slots} {kind}{note}"
    return ArgSpec(name, build(laid, shape, **more), options, CODED, compares=compares)


AOT = (
    *(
        _model(model, batch, slots, kind)
        for model in MODELS
        for batch in (1, 8, 64)
        for slots in (4096, 32768)
        for kind in KINDS
    ),
    *(
        _model("llama-3-8b", 8, slots, kind, " tail", masked="positions", tail=129)
        for slots in (4096, 32768)
        for kind in ("int4", "int2")
    ),
    _model("llama-3-8b", 8, 32768, "bf16", " positions", masked="positions"),
    _model("llama-3-8b", 8, 32768, "bf16", " run of 8", masked="positions", length=8),
    _model("llama-3-8b", 8, 4096, "bf16", " probabilities", masked="both", bias=True, options={"probabilities": True}),
    _model("gemma-3-4b", 8, 32768, "bf16", " window", masked="positions", options={"window": 1024}),
    *(
        _model(model, 1, 32768, "bf16", f" prefix of {rows} rows", rows, masked="positions")
        for model in ("llama-3-8b", "gemma-3-4b")
        for rows in (8, 64)
    ),
)

CI = tuple(spec for spec in AOT if spec.name in ("llama-3.2-1b b8 4096 bf16", "llama-3-8b b8 4096 int2 tail"))
