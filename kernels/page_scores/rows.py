"""Queries split by sign, as they meet a page's minima and maxima, and what an empty page makes of their product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def split_by_sign(queries: Float[Array, "B G R T D"]) -> Float[Array, "B G RT E"]:
    """[-relu(-q), relu(q)] of each query of a KV head."""
    batch, heads, _, _, dim = queries.shape
    rows = queries.reshape(batch, heads, -1, dim)
    return jnp.concatenate([-jax.nn.relu(-rows), jax.nn.relu(rows)], axis=-1)


def empty_as_lowest(products: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """-inf where a page is empty: bounds of +inf and -inf give -inf, or nan where a query is 0."""
    return jnp.where(products > -jnp.inf, products, -jnp.inf)
