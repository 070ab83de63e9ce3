"""Partial softmax attention and its merge: attention is associative over disjoint sets of keys.

With out_i the softmax-weighted mean over set i and lse_i the log of its sum of exponentials,

    lse = log sum_i exp(lse_i),      out = sum_i exp(lse_i - lse) out_i.

Tiers, shared prefixes, split-K and context-parallel decoding all rest on this one identity
(flash-decoding; Hydragen, Juravsky et al. 2024, section 3).
"""

from dataclasses import dataclass
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
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
    lse = jnp.stack([part.lse for part in parts])
    top = jnp.max(lse, axis=0)
    # A row that sees nothing has top = -inf; exp(-inf - -inf) would be nan.
    finite_top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(lse - finite_top)
    total = jnp.sum(weights, axis=0)
    divisor = jnp.where(total > 0, total, 1.0)
    weighted = [part.out * (weight / divisor)[..., None] for part, weight in zip(parts, weights, strict=True)]
    out = reduce(add, weighted)
    return Partial(out=out, lse=jnp.where(total > 0, finite_top + jnp.log(divisor), -jnp.inf))
