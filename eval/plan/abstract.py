"""Prefill without weights: the cache that a policy would leave behind, as shapes, and the trace that leads to it.

The cache is built, not estimated: the same code runs over shapes, so positions, statistics, scales, spare slots and
padding are all in it, and a policy that cannot serve the model refuses it as it would refuse the real one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh

import kvx
from kvx.buckets import bucket
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.eval.cache_bytes import CacheBytes
from kvx.eval.live_bytes import device_bytes
from kvx.eval.plan.tiles import tiled_bytes
from kvx.mesh import RULES, Placement, place_cache, place_parameters
from kvx.policy import Policy

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class AbstractPrefill:
    """What one prefill comes to.

    Attributes:
        cache: with shapes for arrays.
        trace: the run of programs that makes it (`kvx.eval.live_bytes`).
        bound: only the data say how many slots a layer needs, so the cache is the largest that any prompt may need.
    """

    cache: KVCache
    trace: ClosedJaxpr
    bound: bool


def abstract_prefill(model: Decoder, policy: Policy, context: int, rows: int, room: int) -> AbstractPrefill:
    """Prompts of `context` tokens in every row, padded as `kvx.prefill` pads them.

    Args:
        model: shapes for parameters (`kvx.models.build.abstract_model`), or arrays.
        room: tokens to come after the prompt.

    Raises:
        BadInput: what `kvx.prefill` refuses: a policy that cannot serve the model, more positions than it has.
    """
    lengths = np.full(rows, context, np.int32)
    tokens = jax.ShapeDtypeStruct((rows, bucket(context)), jnp.int32)

    def known(model: Decoder, tokens: Any) -> Any:
        return kvx.prefill(model, tokens, policy, lengths, max_new_tokens=bucket(room))

    def unknown(model: Decoder, tokens: Any, lengths: Any) -> Any:
        return kvx.prefill(model, tokens, policy, lengths, max_new_tokens=bucket(room))

    # With lengths that are data too, a policy that counts what it keeps takes its worst case and asks nothing.
    run: Callable[..., Any] = unknown if policy.measures else known
    given = (shapes(model), tokens, *((shapes(lengths),) if policy.measures else ()))
    trace, (_, cache) = jax.make_jaxpr(run, return_shape=True)(*given)
    return AbstractPrefill(cache, trace, policy.measures)


def shapes(tree: Tree) -> Tree:
    """The tree with a shape for every array; constants of an abstract model are arrays, which no chip at hand holds."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@dataclass(frozen=True)
class AbstractCaches:
    """Caches of any number of rows, from those of one row and of two: every axis of every array grows evenly."""

    one: KVCache
    two: KVCache

    def rows(self, count: int) -> KVCache:
        """The cache of a batch, as shapes."""

        def grown(one: Any, two: Any) -> Any:
            axes = zip(one.shape, two.shape, strict=True)
            return jax.ShapeDtypeStruct(tuple(a + (count - 1) * (b - a) for a, b in axes), one.dtype)

        return jax.tree.map(grown, self.one, self.two)


def step_bytes(cache: KVCache) -> int | None:
    """Bytes of the cache that a decode step reads, where shapes alone say it; None where its data do."""
    found: list[Any] = []

    def ask(cache: KVCache) -> int:
        found.extend(store.bytes_read() for store in cache.layers)
        return 0

    try:
        jax.eval_shape(ask, cache)
    except jax.errors.ConcretizationTypeError:
        return None
    return sum(found) if all(isinstance(each, int) for each in found) else None


@dataclass(frozen=True)
class Split:
    """How arrays lie over chips that hold one model together, by the rules that place them in earnest (`kvx.mesh`).

    What a chip count does not divide is held whole by each: three KV heads on two chips, eight on sixteen. So beyond
    the number of KV heads a cache no longer shrinks.

    Attributes:
        chips: along the one axis of the mesh.
        tiled: count what tiles take, as a TPU's memory does (`kvx.eval.plan.tiles`).
    """

    chips: int = 1
    tiled: bool = False

    def parameters(self, model: Any) -> int:
        """Bytes of a model, or of a part of one, on one chip."""
        placed = place_parameters(self._placement, shapes(model))
        return sum(self._part(leaf) for leaf in jax.tree.leaves(placed))

    def cache(self, cache: KVCache, rows: int, kv_heads: int) -> CacheBytes:
        """Bytes of a cache on one chip."""
        return CacheBytes.of(place_cache(self._placement, cache, rows, kv_heads), self._part)

    def array(self, aval: Any, rows: int, kv_heads: int) -> int:
        """Bytes on one chip of an array that a prefill makes, placed as those of a cache."""
        if device_bytes(aval) == 0:
            return 0
        return self._part(place_cache(self._placement, shapes(aval), rows, kv_heads))

    @property
    def _placement(self) -> Placement:
        return Placement(AbstractMesh((self.chips,), ("tensor",)), RULES)

    def _part(self, leaf: Any) -> int:
        shape, itemsize = leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize
        return tiled_bytes(shape, itemsize) if self.tiled else prod(shape) * itemsize
