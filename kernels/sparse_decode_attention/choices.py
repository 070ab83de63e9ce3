"""Queries by the choice they read: choices of a KV head serve equal parts of its query heads, and one query or all."""

import jax.numpy as jnp
from jaxtyping import Array

from kvx.kernels.merge_partials import Partial


def by_choice(array: Array, sets: int, spread: int) -> Array:
    """(B, G, R, T, ...) as (B * G * K * U, R / K * T / U, ...): a list of queries for each choice.

    Args:
        array: a value of every query.
        sets: K, choices that the query heads of a KV head share in equal parts.
        spread: U, 1 if all T queries share them, else T.
    """
    batch, heads, group, length, *rest = array.shape
    array = array.reshape(batch, heads, sets, group // sets, spread, length // spread, *rest)
    return jnp.swapaxes(array, 3, 4).reshape(batch * heads * sets * spread, -1, *rest)


def by_head(part: Partial, shape: tuple[int, int, int, int, int, int]) -> Partial:
    """The other way, for what was found; `shape` is (B, G, K, U, R / K, T / U)."""
    batch, heads, sets, spread, group, length = shape

    def back(array: Array, *rest: int) -> Array:
        array = jnp.swapaxes(array.reshape(*shape, *rest), 3, 4)
        return array.reshape(batch, heads, sets * group, spread * length, *rest)

    return Partial(back(part.out, part.out.shape[-1]), back(part.lse))
