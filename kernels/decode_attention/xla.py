"""Decode attention by XLA: one product a KV head, codes decoded as they lie; what a CPU runs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvx.kernels.decode_attention.call import Call, Found
from kvx.kernels.decode_attention.operands import Operand, Rows
from kvx.kernels.logits import capped, partial_softmax, scaled_logits, softmax_rows
from kvx.kernels.merge_partials import Partial, merge_partials


def attend(call: Call) -> Found:
    """Slots and tail each as a partial softmax, merged."""
    logits, *exact = masked_logits(call)
    part = _weighted(logits, call)
    if not exact:
        return part, logits if call.logits else None
    assert call.tail is not None, "there are logits of it"
    part = merge_partials(part, partial_softmax(exact[0], call.tail.values))
    return part, jnp.concatenate([logits, *exact], axis=-1) if call.logits else None


def masked_logits(call: Call) -> list[Float[Array, "B G Q N"]]:
    """Logits of the slots, and of the tail's entries if there is one; -inf where a row does not see them."""
    scores, seen = _scores(call), call.seen()
    logits = scores if call.bias is None else scores + call.bias[:, :, None]
    found = [logits if seen is None else jnp.where(seen, logits, -jnp.inf)]
    if call.tail is not None:
        exact = scaled_logits(call.queries, call.tail.keys, call.scale, call.softcap)
        found.append(jnp.where(call.tail_seen(), exact, -jnp.inf))
    return found


def _scores(call: Call) -> Float[Array, "B G Q C"]:
    """Unmasked logits of the slots, without bias."""
    keys, queries = call.keys, call.queries
    if isinstance(keys, Rows) and not keys.slots_last and keys.scale is None:
        return scaled_logits(queries, keys.array, call.scale, call.softcap)
    # Slots stay along the last axis, as they lie: turned about, XLA would decode into a transposed copy.
    subscripts = "bgqd,bgcd->bgqc" if isinstance(keys, Rows) and not keys.slots_last else "bgqd,bgdc->bgqc"
    scores = jnp.einsum(subscripts, queries, _numbers(keys, call), preferred_element_type=jnp.float32)
    if isinstance(keys, Rows) and keys.scale is not None:
        scores = scores * keys.scale
    return capped(call.scale * scores, call.softcap)


def _weighted(logits: Float[Array, "B G Q C"], call: Call) -> Partial:
    """Partial softmax of the slots."""
    values = call.values
    if isinstance(values, Rows) and not values.slots_last and values.scale is None:
        return partial_softmax(logits, values.array)
    weights, lse = softmax_rows(logits)
    if isinstance(values, Rows) and values.scale is not None:
        weights = weights * values.scale
    numbers = _numbers(values, call)
    subscripts = "bgqc,bgcv->bgqv" if isinstance(values, Rows) and not values.slots_last else "bgqc,bgvc->bgqv"
    out = jnp.einsum(subscripts, weights.astype(numbers.dtype), numbers, preferred_element_type=jnp.float32)
    return Partial(out, lse)


def _numbers(operand: Operand, call: Call) -> Float[Array, "B G m n"]:
    """The operand as floats, as it lies, its scale left out."""
    if isinstance(operand, Rows):
        return operand.array if operand.scale is None else operand.array.astype(call.queries.dtype)
    decoded = operand.decode(after=call.queries[:, :, 0, 0])
    return decoded if call.tail is None else decoded.astype(call.tail.keys.dtype)
