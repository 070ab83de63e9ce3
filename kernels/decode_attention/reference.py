"""Decode attention as its formula says, in float32: everything decoded, all logits at once."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvx.kernels.decode_attention.call import Call, Found
from kvx.kernels.decode_attention.operands import Operand, Rows
from kvx.kernels.logits import capped, softmax_rows
from kvx.kernels.merge_partials import Partial


def attend(call: Call) -> Found:
    """Softmax over slots and tail together."""
    queries = call.queries.astype(jnp.float32)
    keys, values, seen = whole(call.keys), whole(call.values), call.seen()
    logits = capped(call.scale * _product(queries, keys), call.softcap)
    if call.bias is not None:
        logits = logits + call.bias[:, :, None]
    logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
    if call.tail is not None:
        exact = capped(call.scale * _product(queries, call.tail.keys.astype(jnp.float32)), call.softcap)
        logits = jnp.concatenate([logits, jnp.where(call.tail_seen(), exact, -jnp.inf)], axis=-1)
        values = jnp.concatenate([values, call.tail.values.astype(jnp.float32)], axis=2)
    weights, lse = softmax_rows(logits)
    out = jnp.einsum("bgqc,bgcv->bgqv", weights, values, precision="highest")
    return Partial(out, lse), logits if call.logits else None


def whole(operand: Operand) -> Float[Array, "B G C D"]:
    """What the operand stands for, float32."""
    if not isinstance(operand, Rows):
        return jnp.swapaxes(operand.decode(), -1, -2)
    rows = (jnp.swapaxes(operand.array, -1, -2) if operand.slots_last else operand.array).astype(jnp.float32)
    return rows if operand.scale is None else rows * jnp.swapaxes(operand.scale, -1, -2)


def _product(queries: Float[Array, "B G Q D"], keys: Float[Array, "B G C D"]) -> Float[Array, "B G Q C"]:
    return jnp.einsum("bgqd,bgcd->bgqc", queries, keys, precision="highest")
