"""The sparse read without a kernel of its own: what was chosen is gathered, then read as a small dense cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kvx.kernels.logits import partial_softmax, scaled_logits, visible
from kvx.kernels.merge_partials import Partial
from kvx.kernels.ragged_decode_attention.xla import apart
from kvx.kernels.sparse_decode_attention.choices import by_choice, by_head


def attend(
    queries: Float[Array, "B G R T D"],
    keys: Float[Array, "B G C E"],
    values: Float[Array, "B G C V"] | None,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G C"],
    chosen: Int[Array, "B G K U N"],
    page: int,
    *,
    value_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Partial:
    """Partial softmax of every choice's queries over its pages."""
    batch, heads, group, length, dim = queries.shape
    sets, spread, count = chosen.shape[2:]
    lists = (batch, heads, sets * spread)
    index = jnp.maximum(chosen, 0).reshape(batch, heads, -1)

    def gathered(array: Shaped[Array, "B G C *rest"]) -> Shaped[Array, "B G L S *rest"]:
        rest = array.shape[3:]
        pages = array.reshape(batch, heads, -1, page, *rest)
        rows = jnp.take_along_axis(pages, index.reshape(*index.shape, *[1] * (pages.ndim - 3)), axis=2)
        return rows.reshape(*lists, count * page, *rest)

    slots = jnp.where(jnp.repeat(chosen >= 0, page, axis=-1).reshape(*lists, -1), gathered(key_positions), -1)
    some, other = apart(gathered(keys), None if values is None else gathered(values), dim, value_dim)
    positions = jnp.broadcast_to(query_positions[:, None, None], queries.shape[:4])
    positions = by_choice(positions, sets, spread).reshape(*lists, -1)
    asked = by_choice(queries, sets, spread).reshape(*lists, -1, dim)
    seen = visible(positions[..., None], slots[..., None, :], window)
    part = partial_softmax(jnp.where(seen, scaled_logits(asked, some, scale, softcap), -jnp.inf), other)
    return by_head(part, (batch, heads, sets, spread, group // sets, length // spread))
