"""Attention of a few queries over cached slots, dense or compressed: a partial softmax, and slots' probabilities."""

from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.kernels.checks import check_masking, check_shape
from kvx.kernels.decode_attention import xla
from kvx.kernels.decode_attention.call import Call, Found
from kvx.kernels.decode_attention.operands import Operand, Rows, Tail
from kvx.kernels.implementations import KERNELS, choose
from kvx.kernels.logits import scaled_logits, slot_probabilities, visible
from kvx.kernels.merge_partials import Partial
from kvx.kernels.over_mesh import KV_HEADS, ROWS, over_mesh
from kvx.kernels.quantize_pack.coded import ChannelCodes

NAMES = ("reference", "xla", "mosaic_tpu", "triton")
"""Implementations: one file each, loaded when it is first asked for."""

AXES = {"positions": ROWS} | dict.fromkeys(
    ("queries", "keys", "values", "slots", "lengths", "bias", "tail"), ROWS + KV_HEADS
)
"""A call's arrays by name, and their axes that a mesh may split."""


@overload
def decode_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G C D"] | Operand,
    values: Float[Array, "B G C V"] | Operand,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B G C"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    lengths: Int[Array, "B G"] | None = None,
    bias: Float[Array, "B G C"] | None = None,
    tail: Tail | None = None,
    probabilities: Literal[False] = False,
    implementation: str | None = None,
    tuning: Any = None,
) -> Partial: ...


@overload
def decode_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G C D"] | Operand,
    values: Float[Array, "B G C V"] | Operand,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B G C"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    lengths: Int[Array, "B G"] | None = None,
    bias: Float[Array, "B G C"] | None = None,
    tail: Tail | None = None,
    probabilities: Literal[True],
    implementation: str | None = None,
    tuning: Any = None,
) -> tuple[Partial, Float[Array, "B G R T N"]]: ...


def decode_attention(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G C D"] | Operand,
    values: Float[Array, "B G C V"] | Operand,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B G C"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    lengths: Int[Array, "B G"] | None = None,
    bias: Float[Array, "B G C"] | None = None,
    tail: Tail | None = None,
    probabilities: bool = False,
    implementation: str | None = None,
    tuning: Any = None,
) -> Partial | tuple[Partial, Float[Array, "B G R T N"]]:
    """Partial softmax of rotated queries over rotated cached keys, decoded on the fly and never in main memory.

    A query sees the slots whose position is neither -1 (empty) nor later than its own nor outside the window, and
    which `lengths` does not exclude. Long caches are split over their slots and merged by log-sum-exp
    (flash-decoding); per-channel keys and per-token values are KIVI's layout (Liu et al. 2024).

    Args:
        queries: R query heads for each KV head, T queries a row (a GPU's kernel takes up to 16), bfloat16 or float32.
        keys, values: numbers by slot, or `Rows` of 8 bits, `ChannelCodes` or `TokenCodes` of 2, 4 or 8 (xla: also 3).
        query_positions: true positions; None: no order among slots and queries, every query sees every slot.
        key_positions: true positions of the slots, -1 where empty; None: no array of them is read.
        scale: factor on q . k.
        window: positions back that a query sees, itself included.
        softcap: c of c tanh(scale q . k / c).
        lengths: slots in use of each row and head, the first ones; what lies behind counts as nothing, and must
            be finite, as what empty slots hold.
        bias: natural log of a slot's weight, added to its capped logit.
        tail: exact tokens in the same softmax, masked by their positions.
        probabilities: return also those of the slots, the tail's E entries last: N = C + E, float32, 0 where unseen.
        implementation: "reference", "xla", "mosaic_tpu", "triton"; None: by platform and operands.
        tuning: block sizes of the named implementation; None: its own choice.

    Returns:
        out (B, G, R, T, V) and lse (B, G, R, T), float32; (0, -inf) where a query sees nothing. With `probabilities`
        the pair of that and (B, G, R, T, N).

    Raises:
        ValueError: operands that do not fit each other, or that the named implementation cannot take.
    """
    masks = query_positions, key_positions, lengths
    call = _call(queries, keys, values, masks, bias, tail, scale, window, softcap, probabilities)
    offered = {name: partial(_attend, name) for name in NAMES}
    attend = choose("decode_attention", implementation, offered, lambda name: _refusal(name, call))
    rows, logits = attend(call) if tuning is None else attend(call, tuning)
    part = ungroup(rows, queries.shape[2])
    if logits is None:
        return part
    return part, slot_probabilities(logits.reshape(*queries.shape[:4], -1), part.lse)


def decode_probabilities(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G C D"] | Operand,
    query_positions: Int[Array, "B T"] | None,
    key_positions: Int[Array, "B G C"] | None,
    lse: Float[Array, "B G R T"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: Float[Array, "B G C"] | None = None,
    tail: Tail | None = None,
) -> Float[Array, "B G R T N"]:
    """Probabilities of the slots, the tail's last, under a log-sum-exp that may span more than these.

    A second pass over the keys, by XLA; `decode_attention(probabilities=True)` has them from the first.
    """
    slots = keys.slots if isinstance(keys, Operand) else keys.shape[2]
    nothing = jnp.zeros((*queries.shape[:2], slots, 0), queries.dtype)
    tail = tail and replace(tail, values=tail.values[..., :0])
    masks = query_positions, key_positions, None
    call = _call(queries, keys, nothing, masks, bias, tail, scale, window, softcap, True)
    logits = jnp.concatenate(xla.masked_logits(call), axis=-1)
    return slot_probabilities(logits.reshape(*queries.shape[:4], -1), lse)


def slot_logits(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G C D"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G C"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B G R*T C"]:
    """Masked logits with the R query heads and T queries of a KV head merged into one matrix axis.

    Merged, the product is one matmul a KV head; kept apart, XLA on CPU transposes the whole key cache.
    """
    batch, kv_heads, group, length, dim = queries.shape
    logits = scaled_logits(queries.reshape(batch, kv_heads, group * length, dim), keys, scale, softcap)
    seen = visible(query_positions[:, None, :, None], key_positions[:, :, None, :], window)
    return jnp.where(jnp.tile(seen, (1, 1, group, 1)), logits, -jnp.inf)


def ungroup(part: Partial, group: int) -> Partial:
    """A partial over merged (R * T) rows as one over R query heads and T queries."""
    batch, kv_heads, rows, width = part.out.shape
    shape = (batch, kv_heads, group, rows // group)
    return Partial(out=part.out.reshape(*shape, width), lse=part.lse.reshape(shape))


def _call(
    queries: Array,
    keys: Array | Operand,
    values: Array | Operand,
    masks: tuple[Array | None, Array | None, Array | None],
    bias: Array | None,
    tail: Tail | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    logits: bool,
) -> Call:
    """The arguments checked and brought into one form; masks: positions of queries and slots, lengths."""
    positions, slots, lengths = masks
    keys = keys if isinstance(keys, Operand) else Rows(keys)
    values = values if isinstance(values, Operand) else Rows(values)
    check_shape("queries", queries, (None,) * 5)
    batch, heads, group, length, dim = queries.shape
    if isinstance(values, ChannelCodes):
        raise ValueError("values is ChannelCodes, allowed are arrays, Rows and TokenCodes")
    if keys.width != dim:
        raise ValueError(f"keys has rows of {keys.width} channels, the queries have {dim}; they must be equal")
    if values.slots != keys.slots:
        raise ValueError(f"values has {values.slots} slots, keys has {keys.slots}; they must be equal")
    for name, rows in (("keys", keys), ("values", values)):
        for array in jax.tree.leaves(rows):
            if array.shape[:2] != (batch, heads):
                raise ValueError(f"{name} has an array of shape {array.shape}, allowed are ({batch}, {heads}, ...)")
        if isinstance(rows, Rows):
            check_shape(f"{name}.scale", rows.scale, (batch, heads, 1, keys.slots), (batch, heads, 1, 1))
            if rows.scale is None and not (jnp.issubdtype(rows.array.dtype, jnp.floating) and rows.array.itemsize > 1):
                allowed = "floats of 16 or 32 bits, and 8-bit numbers with a scale"
                raise ValueError(f"{name} has {rows.array.dtype} numbers and no scale, allowed are {allowed}")
    check_shape("key_positions", slots, (batch, heads, keys.slots))
    check_shape("bias", bias, (batch, heads, keys.slots))
    check_shape("lengths", lengths, (batch, heads))
    check_shape("query_positions", positions, (batch, length))
    if tail is not None:
        check_shape("tail.positions", tail.positions, (batch, heads, None))
        check_shape("tail.keys", tail.keys, (*tail.positions.shape, dim))
        check_shape("tail.values", tail.values, (*tail.positions.shape, values.width))
    if slots is not None and positions is None:
        raise ValueError("query_positions is None beside key_positions, allowed are the queries' true positions")
    if window is not None and slots is None:
        raise ValueError(f"window is {window}, without key_positions allowed is None")
    check_masking(window, softcap)
    rows = queries.reshape(batch, heads, group * length, dim)
    return Call(rows, keys, values, positions, slots, lengths, bias, tail, length, scale, window, softcap, logits)


def _attend(name: str, call: Call, *tuning: Any) -> Found:
    attend = import_module(f"{__name__}.{name}").attend
    if name not in KERNELS:
        return attend(call, *tuning)

    def run(*own: Any) -> Found:
        return attend(replace(call, **dict(zip(AXES, own, strict=True))), *tuning)

    return over_mesh(run, [*AXES.values()], ROWS + KV_HEADS)(*(getattr(call, name) for name in AXES))


def _refusal(name: str, call: Call) -> str | None:
    """Why an implementation cannot take the call; None if it can."""
    if name not in KERNELS:
        return None
    return import_module(f"{__name__}.{name}").refusal(call)
