"""Which blocks of keys a block of queries can see: what lets a kernel skip what masks exclude, whatever they are.

Causality, empty slots, padding, windows and documents all come as arrays. Two small tables say, for each block, from
which block to which block of the other side anything is visible, and in which run inside of that everything is, so
that no mask need be applied there. Blocks are judged by the extremes of their positions and labels: an entry may be
visited in vain, none that is visible is left out.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from kvx.kernels.logits import SHARED

_FAR = 2**30
"""Beyond every position and label, and a sum of two of them is still an int32."""


class Extent(NamedTuple):
    """The extremes of a block's tokens; of no tokens: the empty interval."""

    low: Int[Array, "*batch N"]
    high: Int[Array, "*batch N"]

    @classmethod
    def of(cls, array: Int[Array, "*batch L"], real: Bool[Array, "*batch L"], size: int) -> "Extent":
        """Of each block of `size`, over its real tokens."""
        return cls(
            jnp.min(_blocks(jnp.where(real, array, _FAR), size, _FAR), axis=-1),
            jnp.max(_blocks(jnp.where(real, array, -_FAR), size, -_FAR), axis=-1),
        )


def reaches(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B G S"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    window: int | None,
    query_block: int,
    key_block: int,
) -> tuple[Int[Array, "B G Q 4"], Int[Array, "B G K 4"]]:
    """Runs of key blocks for each query block, and of query blocks for each key block.

    Each as (first, first full, end of full, end): visible at all in [first, end), wholly so in [first full, end of
    full). Labels without a table only: each sees its own, and SHARED.
    """
    some, every = _pairs(query_positions, key_positions, segments, window, query_block, key_block)
    return _runs(some, every), _runs(some.swapaxes(-1, -2), every.swapaxes(-1, -2))


def _pairs(query_positions, key_positions, segments, window, query_block, key_block):
    """(B, G, Q, K): whether a pair of blocks may see anything, and whether all of it sees all."""
    query_real, key_real = query_positions >= 0, key_positions >= 0
    query = Extent.of(query_positions, query_real, query_block)
    key = Extent.of(key_positions, key_real, key_block)
    query_low, query_high = (array[:, None, :, None] for array in query)
    key_low, key_high = (array[:, :, None, :] for array in key)
    some = key_low <= query_high
    every = (key_high <= query_low) & (key_high >= 0) & (query_low < _FAR)
    every &= _all(query_real, query_block)[:, None, :, None] & _all(key_real, key_block)[:, :, None, :]
    if window is not None:
        some &= query_low - key_high < window
        every &= query_high - key_low < window
    if segments is not None:
        labels = Extent.of(segments[0], query_real, query_block)
        # One head's slots may be empty where another's are not; labels are the same, and so is a superset's interval.
        others = Extent.of(segments[1], jnp.any(key_real, axis=1), key_block)
        shared = _any(jnp.any(key_real, axis=1) & (segments[1] == SHARED), key_block)[:, None, :]
        first, last = (array[:, :, None] for array in labels)
        low, high = (array[:, None, :] for array in others)
        some &= (((low <= last) & (first <= high)) | shared)[:, None]
        every &= ((first == last) & (low == high) & (first == low))[:, None]
    return some, every & some


def _runs(some: Bool[Array, "*batch N M"], every: Bool[Array, "*batch N M"]) -> Int[Array, "*batch N 4"]:
    size = some.shape[-1]
    index = jnp.arange(size, dtype=jnp.int32)
    start = jnp.min(jnp.where(some, index, size), axis=-1)
    end = jnp.max(jnp.where(some, index + 1, 0), axis=-1)
    start = jnp.minimum(start, end)
    full = jnp.min(jnp.where(every, index, size), axis=-1)
    broken = ~every & (index >= full[..., None])
    stop = jnp.min(jnp.where(broken, index, size), axis=-1)
    none = full == size
    runs = (start, jnp.where(none, start, full), jnp.where(none, start, stop), end)
    return jnp.stack(runs, axis=-1).astype(jnp.int32)


def _blocks(array: Array, size: int, fill: int | bool) -> Array:
    """(..., blocks, size), the last block filled up."""
    padding = -array.shape[-1] % size
    padded = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, padding)], constant_values=fill)
    return padded.reshape(*array.shape[:-1], -1, size)


def _all(flags: Bool[Array, "*batch L"], size: int) -> Bool[Array, "*batch N"]:
    # A block that is filled up is not full.
    return jnp.all(_blocks(flags, size, False), axis=-1)


def _any(flags: Bool[Array, "*batch L"], size: int) -> Bool[Array, "*batch N"]:
    return jnp.any(_blocks(flags, size, False), axis=-1)


def causal_reaches(
    lengths: Int[Array, "B"], total: int, query_block: int, key_block: int
) -> tuple[Int[Array, "B 1 Q 4"], Int[Array, "B 1 K 4"]]:
    """The same for rows of `lengths` tokens in order, padding last, each token seeing itself and those before it.

    What a whole prompt is: arithmetic on the lengths, where the general tables take several passes over positions.
    """
    real = lengths[:, None]
    query = jnp.arange(-(-total // query_block), dtype=jnp.int32) * query_block
    end = jnp.where(query < real, -(-jnp.minimum(query + query_block, real) // key_block), 0)
    whole = jnp.where(query + query_block <= real, (query + 1) // key_block, 0)
    by_query = (jnp.zeros_like(end), jnp.zeros_like(end), jnp.minimum(whole, end), end)
    key = jnp.arange(-(-total // key_block), dtype=jnp.int32) * key_block
    first = jnp.broadcast_to(key // query_block, (*real.shape[:1], *key.shape))
    last = jnp.where(key < real, -(-real // query_block), first)
    full = -(-(key + key_block - 1) // query_block)
    stop = jnp.where(key + key_block <= real, real // query_block, 0)
    none = stop <= full
    by_key = (first, jnp.where(none, first, full), jnp.where(none, first, stop), last)
    return _table(by_query), _table(by_key)


def reaches_in_order(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B G T"], query_block: int, key_block: int
) -> tuple[Int[Array, "B G Q 4"], Int[Array, "B G K 4"]]:
    """`causal_reaches` for every KV head: keys are the queries' own tokens, in order, padding last."""
    lengths = jnp.sum(query_positions >= 0, axis=1, dtype=jnp.int32)
    found = causal_reaches(lengths, key_positions.shape[2], query_block, key_block)
    by_query, by_key = (jnp.broadcast_to(runs, (*key_positions.shape[:2], *runs.shape[2:])) for runs in found)
    return by_query, by_key


def lengthened(array: Shaped[Array, "..."], axis: int, size: int, fill: int | float) -> Shaped[Array, "..."]:
    """The array filled up to `size` along an axis: kernels take whole blocks."""
    if array.shape[axis] == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths, constant_values=fill)


def _table(runs: tuple[Array, ...]) -> Int[Array, "B 1 N 4"]:
    return jnp.stack(runs, axis=-1)[:, None].astype(jnp.int32)
