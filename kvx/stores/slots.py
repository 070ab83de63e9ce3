"""Slots: finding empty ones, writing rows into them in place, and choosing the weakest that are held."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


def first_empty(slots: Int[Array, "B G C"]) -> Int[Array, "B G"]:
    """Index of the first empty slot; C where there is none, which no write reaches."""
    capacity = slots.shape[-1]
    return jnp.min(jnp.where(slots < 0, jnp.arange(capacity), capacity), axis=-1)


def empty_slots(slots: Int[Array, "B G C"], count: int) -> Int[Array, "B G n"]:
    """Indices of the first `count` empty slots, ascending; past the last, out of reach, if there are fewer."""
    if count == 1:
        return first_empty(slots)[..., None]
    index = jnp.arange(slots.shape[-1])
    # Occupied ones count as beyond the last, each by its own index: a scatter is promised distinct ones.
    return jnp.sort(jnp.where(slots < 0, index, index + index.size), axis=-1)[..., :count]


def scatter(
    array: Shaped[Array, "B G C *rest"], index: Int[Array, "B G n"], rows: Shaped[Array, "B G n *rest"]
) -> Shaped[Array, "B G C *rest"]:
    """Rows written in place along the third axis at ascending, distinct indices; those beyond the end are dropped.

    The form of which XLA makes no copy of the array; a conditional or `where` around it would.
    """
    if index.shape[-1] == 1:
        return write_slot(array, index[..., 0], rows[:, :, 0])
    batch, heads = jnp.ogrid[: array.shape[0], : array.shape[1]]
    return array.at[batch[..., None], heads[..., None], index].set(
        rows.astype(array.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
    )


def write_slot(
    array: Shaped[Array, "B G C *rest"], slot: Int[Array, "B G"], value: Shaped[Array, "B G *rest"]
) -> Shaped[Array, "B G C *rest"]:
    """One row a head overwritten in place.

    A scatter with unique, sorted indices is the form of which XLA on CPU makes no copy of the cache, where
    dynamic_update_slice and `where` do.
    """
    if slot.size == 1:
        # XLA turns a scatter of one row into a dynamic_update_slice; so there is a second, beyond the end, dropped.
        slot = jnp.concatenate([slot, jnp.full_like(slot, array.shape[2] + 1)], axis=1)
        value = jnp.concatenate([value, value], axis=1)
    batch, heads = jnp.ogrid[: array.shape[0], : array.shape[1]]
    return array.at[batch, heads, slot].set(
        value.astype(array.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
    )


def weakest(scores: Float[Array, "B G C"], slots: Int[Array, "B G C"]) -> Int[Array, "B G"]:
    """The occupied slot with the lowest score; in a tie the higher position, so that the lower is kept."""
    occupied = slots >= 0
    lowest = jnp.min(jnp.where(occupied, scores, jnp.inf), axis=-1, keepdims=True)
    tied = jnp.where(occupied & (scores == lowest), slots, -1)
    return jnp.argmax(tied, axis=-1).astype(jnp.int32)


def weakest_several(
    scores: Float[Array, "B G C"], slots: Int[Array, "B G C"], excess: Int[Array, "B G"], most: int
) -> Bool[Array, "B G C"]:
    """Mask of the `excess` occupied slots with the lowest scores, at most `most`; ties as in `weakest`."""
    index = jnp.arange(slots.shape[-1])
    if most == 1:
        return (excess > 0)[..., None] & (index == weakest(scores, slots)[..., None])
    worth = jnp.where(slots >= 0, scores, jnp.inf)
    keys = (worth, -slots, jnp.broadcast_to(index, slots.shape))
    order = jax.lax.sort(keys, dimension=-1, num_keys=2)[2][..., :most]
    leaving = jnp.arange(order.shape[-1]) < jnp.minimum(excess, most)[..., None]
    batch, heads = jnp.ogrid[: slots.shape[0], : slots.shape[1]]
    chosen = jnp.zeros(slots.shape, bool).at[batch[..., None], heads[..., None], order].set(leaving)
    return chosen & (slots >= 0)
