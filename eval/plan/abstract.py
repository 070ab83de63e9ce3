"""Prefill without weights: the cache that a policy would leave behind, as shapes, and the trace that leads to it.

The cache is built, not estimated: the same code runs over shapes, so positions, statistics, scales, spare slots and
padding are all in it, and a policy that cannot serve the model refuses it as it would refuse the real one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
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
from kvx.eval.cost.cache_bytes import CacheBytes, Part, parts
from kvx.eval.cost.live_bytes import device_bytes
from kvx.eval.plan.tiles import tiled_bytes
from kvx.mesh import RULES, Placement, place_cache, place_parameters
from kvx.policy import Policy

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class AbstractPrefill:
    """What one prefill comes to.

    Attributes:
        cache: its arrays, as shapes.
        tree: how they make up a `KVCache`.
        read: bytes of it that a decode step reads; None where its data say.
        bound: only the data say how many slots a layer needs, so the cache is the largest that any prompt may need.
        trace: the run of programs that makes it (`kvx.eval.cost.live_bytes`).
    """

    cache: tuple[Part, ...]
    tree: Any
    read: int | None
    bound: bool
    trace: ClosedJaxpr


def abstract_prefill(model: Decoder, policy: Policy, context: int, rows: int, room: int) -> AbstractPrefill:
    """Prompts of `context` tokens in every row, padded as `kvx.prefill` pads them.

    Args:
        model: shapes for parameters (`kvx.models.build.abstract_model`), or arrays.
        room: tokens to come after the prompt.

    Raises:
        BadInput: what `kvx.prefill` refuses: a policy that cannot serve the model, more positions than it has.
    """
    known = np.full(rows, context, np.int32)
    found: list[Any] = []

    def run(model: Decoder, tokens: Any, lengths: Any) -> Any:
        # With lengths that are data too, a policy that counts what it keeps takes its worst case and asks nothing.
        given = lengths if policy.measures else known
        logits, cache = kvx.prefill(model, tokens, policy, given, max_new_tokens=bucket(room))
        found.extend((parts(cache), jax.tree.structure(cache), _step_bytes(cache)))
        return logits, jax.tree.leaves(cache)

    tokens = jax.ShapeDtypeStruct((rows, bucket(context)), jnp.int32)
    trace = jax.make_jaxpr(run)(shapes(model), tokens, shapes(known))
    cache, tree, read = found
    cache = tuple(part._replace(array=shapes(part.array)) for part in cache)
    return AbstractPrefill(cache, tree, read, policy.measures, trace)


def _step_bytes(cache: KVCache) -> int | None:
    """Bytes that a decode step reads, of a cache of tracers."""
    try:
        found = [store.bytes_read() for store in cache.layers]
    except jax.errors.ConcretizationTypeError:
        return None
    return sum(found) if all(isinstance(each, int) for each in found) else None


def shapes(tree: Tree) -> Tree:
    """The tree with a shape for every array; constants of an abstract model are arrays, which no chip at hand holds."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def grown(one: Part, two: Part, rows: int) -> Part:
    """A part of the cache of any batch, from those of one row and of two: every axis grows evenly."""
    axes = zip(one.array.shape, two.array.shape, strict=True)
    shape = tuple(first + (rows - 1) * (second - first) for first, second in axes)
    return one._replace(array=jax.ShapeDtypeStruct(shape, one.array.dtype))


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
        return sum(
            _shard(leaf, self.tiled) for leaf in jax.tree.leaves(place_parameters(self.placement, shapes(model)))
        )

    def cache(self, cache: Iterable[Part], rows: int, kv_heads: int) -> CacheBytes:
        """Bytes of a cache on one chip."""
        return CacheBytes.of(cache, lambda part: self.part(part, rows, kv_heads))

    def part(self, part: Part, rows: int, kv_heads: int) -> int:
        """Bytes of one of its arrays."""
        return _bytes(self, part.array.shape, part.array.dtype, rows, kv_heads, part.whole)

    def array(self, aval: Any, rows: int, kv_heads: int) -> int:
        """Bytes on one chip of an array that a prefill makes, by its abstract value, placed as those of a cache."""
        return _bytes(self, aval.shape, aval.dtype, rows, kv_heads, False) if device_bytes(aval) else 0

    @property
    def placement(self) -> Placement:
        """On a mesh without devices."""
        return Placement(AbstractMesh((self.chips,), ("tensor",)), RULES)


@lru_cache(maxsize=4096)
def _bytes(split: Split, shape: tuple[int, ...], dtype: Any, rows: int, kv_heads: int, whole: bool) -> int:
    """Equal layers ask the same of it."""
    array = jax.ShapeDtypeStruct(shape, dtype)
    placed = split.placement.put(array, ()) if whole else place_cache(split.placement, array, rows, kv_heads)
    return _shard(placed, split.tiled)


def _shard(placed: Any, tiled: bool) -> int:
    shape, itemsize = placed.sharding.shard_shape(placed.shape), placed.dtype.itemsize
    return tiled_bytes(shape, itemsize) if tiled else prod(shape) * itemsize
