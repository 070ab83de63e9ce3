"""Page scores as one product a KV head, without a kernel of its own."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvx.kernels.page_scores.rows import empty_as_lowest, split_by_sign


def scores(queries: Float[Array, "B G R T D"], bounds: Float[Array, "B G P E"], group: str) -> Float[Array, "B G P"]:
    """-inf for an empty page."""
    rows = split_by_sign(queries)
    products = empty_as_lowest(jnp.einsum("bgme,bgpe->bgmp", rows, bounds, preferred_element_type=jnp.float32))
    return (jnp.max if group == "max" else jnp.mean)(products, axis=2)
