"""Ranking: exact, per row and head, with dynamic counts; in a tie the lower position stays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def ranks(scores: Float[Array, "*batch T"], positions: Int[Array, "*batch T"] | None = None) -> Int[Array, "*batch T"]:
    """Place of each score, 0 = highest; in a tie the lower position comes first, or the lower index if none are given.

    Slots of a store are not in order once they are reused: there the positions are needed.
    """
    if positions is None:
        order = jnp.argsort(-scores, axis=-1, stable=True)
    else:
        order = jnp.lexsort((positions, -scores), axis=-1)
    places = jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=jnp.int32), scores.shape)
    flat_order = order.reshape(-1, scores.shape[-1])
    rows = jnp.arange(flat_order.shape[0])[:, None]
    inverse = jnp.zeros_like(flat_order, jnp.int32).at[rows, flat_order].set(places.reshape(flat_order.shape))
    return inverse.reshape(scores.shape)


def top(
    scores: Float[Array, "*batch T"],
    mask: Bool[Array, "*batch T"],
    counts: Int[Array, "*batch"],
    positions: Int[Array, "*batch T"] | None = None,
) -> Bool[Array, "*batch T"]:
    """Mask of the `counts` highest scores among `mask` (fewer where the mask holds fewer); ties as in `ranks`."""
    return mask & (ranks(jnp.where(mask, scores, -jnp.inf), positions) < counts[..., None])


def largest_remainder(
    shares: Float[Array, "L *batch"], total: Int[Array, "*batch"], caps: Int[Array, "L *batch"]
) -> Int[Array, "L *batch"]:
    """Whole numbers proportional to `shares` that sum to min(total, sum of caps), none above its cap.

    Water-filling: what a capped entry cannot take is shared out among the others. Remainders go to the largest
    fractions, ties to the lower index, so that the total is conserved exactly.
    """
    count = shares.shape[0]
    total = jnp.minimum(total, jnp.sum(caps, axis=0))

    def fill(_, state):
        full, _ = state
        left = total - jnp.sum(jnp.where(full, caps, 0), axis=0)
        # Entries without a share take what the capped ones leave, evenly.
        weight = jnp.where(full, 0.0, jnp.maximum(shares, 1e-20))
        ideal = left * weight / jnp.maximum(jnp.sum(weight, axis=0), 1e-30)
        return full | (ideal >= caps), ideal

    # Each round can only add capped entries; after `count` rounds nothing changes any more.
    none = jnp.zeros(shares.shape, bool), jnp.zeros(shares.shape, jnp.float32)
    full, ideal = jax.lax.fori_loop(0, count, fill, none)
    exact = jnp.where(full, caps.astype(jnp.float32), ideal)
    floors = jnp.minimum(jnp.floor(exact).astype(jnp.int32), caps)
    missing = total - jnp.sum(floors, axis=0)
    room = floors < caps
    fractions = jnp.where(room, exact - floors, -1.0)
    order = jnp.moveaxis(ranks(jnp.moveaxis(fractions, 0, -1)), -1, 0)
    return floors + jnp.where(room & (order < missing), 1, 0)
