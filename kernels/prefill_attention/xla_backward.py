"""The backward pass of prefill attention in plain XLA: probabilities recomputed a block of queries at a time.

Linear in the tokens in memory; the static causal groups of the forward pass skip half of the square here too. It also
serves where a platform's kernels have no backward pass of their own (TPU).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvx.kernels.logits import same_segment, visible
from kvx.kernels.prefill_attention.gradient import Kept, Sight, row_terms
from kvx.kernels.prefill_attention.query_blocks import QueryBlocks


def backward(
    kept: Kept,
    sight: Sight,
    d_out: Float[Array, "B G R T V"],
    d_lse: Float[Array, "B G R T"] | None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, "B G R T D"], Float[Array, "B G S D"], Float[Array, "B G S V"]]:
    """Cotangents of queries, keys and values; see `kvx.kernels.prefill_attention.gradient`."""
    queries, keys, values, _, lse = kept
    blocks = QueryBlocks.of(queries.shape, keys.shape[2])
    rows = (
        blocks.stack(queries, axis=3),
        blocks.stack(d_out.astype(values.dtype), axis=3),
        # +inf makes every probability of a row that sees nothing zero, padding included.
        blocks.stack(jnp.where(jnp.isfinite(lse), lse, jnp.inf), axis=3, fill=jnp.inf),
        blocks.stack(row_terms(kept, d_out, d_lse), axis=3),
        blocks.stack(sight.query_positions, axis=1, fill=-1),
        None if sight.segments is None else blocks.stack(sight.segments[0], axis=1),
    )
    found = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
    d_queries = []
    for first, last, reach in blocks.groups():
        near_keys, near_values = keys[:, :, :reach], values[:, :, :reach]
        spots = sight.key_positions[:, :, :reach]

        def step(carry, row, near_keys=near_keys, near_values=near_values, spots=spots):
            block_queries, d_block, block_lse, terms, positions, labels = row
            scores = scale * _einsum("bgrtd,bgsd->bgrts", block_queries, near_keys)
            slope = scale
            logits = scores
            if softcap is not None:
                bent = jnp.tanh(scores / softcap)
                logits, slope = softcap * bent, scale * (1 - bent**2)
            seen = visible(positions[:, None, None, :, None], spots[:, :, None, None, :], window)
            if sight.segments is not None:
                other = sight.segments[1][:, : spots.shape[-1]]
                seen &= same_segment(labels, other, sight.visibility)[:, None, None]
            weights = jnp.where(seen, jnp.exp(logits - block_lse[..., None]), 0.0)
            pulled = _einsum("bgrtv,bgsv->bgrts", d_block, near_values) + terms[..., None]
            d_scores = (weights * pulled * slope).astype(keys.dtype)
            d_keys = carry[0] + _einsum("bgrts,bgrtd->bgsd", d_scores, block_queries)
            d_values = carry[1] + _einsum("bgrts,bgrtv->bgsv", weights.astype(values.dtype), d_block)
            return (d_keys, d_values), _einsum("bgrts,bgsd->bgrtd", d_scores, near_keys).astype(queries.dtype)

        start = tuple(array[:, :, :reach] for array in found)
        items = jax.tree.map(lambda array, first=first, last=last: array[first:last], rows)
        reduced, d_group = jax.lax.scan(step, start, items)
        found = tuple(array.at[:, :, :reach].set(more) for array, more in zip(found, reduced, strict=True))
        d_queries.append(d_group)
    return blocks.join(d_queries), found[0].astype(keys.dtype), found[1].astype(values.dtype)


def _einsum(equation: str, first: Array, second: Array) -> Array:
    return jnp.einsum(equation, first, second, preferred_element_type=jnp.float32)
