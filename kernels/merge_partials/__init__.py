"""Partial softmax attention and its merge: attention is associative over disjoint sets of keys.

With out_i the softmax-weighted mean over set i and lse_i the log of its sum of exponentials,

    lse = log sum_i exp(lse_i),      out = sum_i exp(lse_i - lse) out_i.

Tiers, shared prefixes, split-K and context-parallel decoding all rest on this one identity
(flash-decoding; Hydragen, Juravsky et al. 2024, section 3).
"""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvx.kernels.pytree import pytree


@pytree
class Partial:
    """Attention over a subset of the keys; the empty subset is (0, -inf).

    Attributes:
        out: weighted mean of the values, float32.
        lse: natural log of the sum of exponentials of the logits, float32.
    """

    out: Float[Array, "*batch V"]
    lse: Float[Array, "*batch"]


def merge_partials(*parts: Partial) -> Partial:
    """Attention over the union of disjoint subsets; any number of parts, empty ones included."""
    weights, lse = _shares(jnp.stack([part.lse for part in parts]))
    weighted = [part.out * weight[..., None] for part, weight in zip(parts, weights, strict=True)]
    return Partial(out=reduce(add, weighted), lse=lse)


def merge_axis(parts: Partial) -> Partial:
    """Attention over the union of subsets whose partials lie along a leading axis, such as the splits of a long cache.

    Args:
        parts: out (N, *batch, V) and lse (N, *batch).

    Returns:
        out (*batch, V) and lse (*batch).
    """
    weights, lse = _shares(parts.lse)
    return Partial(out=jnp.sum(parts.out * weights[..., None], axis=0), lse=lse)


def merge_across(part: Partial, axis: str) -> Partial:
    """Attention over the union of what the devices along a mesh axis hold, inside `jax.shard_map`; the same on each.

    The devices exchange their log-sum-exps' maximum, and then output and sum of exponentials in one collective: bytes
    of one output, however long the caches are.

    Args:
        part: this device's partial; others have the same shape.
        axis: the mesh axis that the keys are split over.
    """
    top = jax.lax.pmax(part.lse, axis)
    finite_top = jnp.where(jnp.isfinite(top), top, 0.0)
    weight = jnp.exp(part.lse - finite_top)[..., None]
    summed = jax.lax.psum(jnp.concatenate([part.out * weight, weight], axis=-1), axis)
    out, total = summed[..., :-1], summed[..., -1]
    divisor = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, finite_top + jnp.log(divisor), -jnp.inf)
    return Partial(out=out / divisor[..., None], lse=lse)


def _shares(lse: Float[Array, "N *batch"]) -> tuple[Float[Array, "N *batch"], Float[Array, "*batch"]]:
    """Each part's weight in the union, and the union's log-sum-exp; zeros and -inf where all parts are empty."""
    top = jnp.max(lse, axis=0)
    # A row that sees nothing has top = -inf; exp(-inf - -inf) would be nan.
    finite_top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(lse - finite_top)
    total = jnp.sum(weights, axis=0)
    divisor = jnp.where(total > 0, total, 1.0)
    return weights / divisor, jnp.where(total > 0, finite_top + jnp.log(divisor), -jnp.inf)
