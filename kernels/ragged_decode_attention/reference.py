"""Attention over listed rows as its definition says it: every row gathered, one softmax, float32."""

import jax.numpy as jnp

from kvx.kernels.logits import partial_softmax, scaled_logits
from kvx.kernels.merge_partials import Partial
from kvx.kernels.ragged_decode_attention.reads import Reads


def attend(reads: Reads, scale: float, window: int | None, softcap: float | None) -> Partial:
    """out (L, M, V) and lse (L, M)."""
    slots = jnp.broadcast_to(jnp.arange(reads.longest), (len(reads.lengths), reads.longest))
    seen = reads.seen(slots, window)
    rows = reads.keys[reads.rows(slots)].astype(jnp.float32)
    keys = rows[..., : reads.queries.shape[-1]]
    values = rows if reads.values is None else reads.values[reads.rows(slots)].astype(jnp.float32)
    values = values[..., values.shape[-1] - reads.value_dim :]
    # What no query sees may be anything, and 0 * nan is nan.
    values = jnp.where(jnp.any(seen, axis=1)[..., None], values, 0.0)
    logits = scaled_logits(reads.queries.astype(jnp.float32), keys, scale, softcap)
    return partial_softmax(jnp.where(seen, logits, -jnp.inf), values)
