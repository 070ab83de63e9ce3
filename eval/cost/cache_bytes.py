"""What a cache's bytes are: keys and values in whatever form, what says which they are, and what lies on the host."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvx.cache import KVCache
from kvx.stores.host import HOST

CONTENT = frozenset(
    {
        "keys", "values", "key", "value",  # as they are, and sums of them
        "words", "lower", "array",  # codes
        "turned",  # the rotary part of latent keys
        "unit", "apart",  # directions of two layers, and rows that do not share one
        "coefficients", "basis", "kept", "rows",  # low-rank keys, values at hand, values on the host
    }
)  # fmt: skip
"""Fields of stores that hold keys, values or codes of them. All others are metadata, scales of codes among them."""


class Part(NamedTuple):
    """One array of a cache.

    Attributes:
        path: where it is in the cache's tree.
        array: itself, a tracer or a shape.
        host: it lives in host memory.
        whole: on a mesh every device holds all of it.
    """

    path: tuple[Any, ...]
    array: Any
    host: bool = False
    whole: bool = False

    @property
    def content(self) -> bool:
        """Whether it is keys, values or codes of them; what lies in a dict are statistics."""
        if any(isinstance(step, jax.tree_util.DictKey) for step in self.path):
            return False
        names = [step.name for step in self.path if isinstance(step, jax.tree_util.GetAttrKey)]
        return bool(names) and names[-1] in CONTENT


def parts(cache: Any) -> tuple[Part, ...]:
    """Every array of a cache, in the order of its leaves."""
    return tuple(
        Part(
            (*above, *below),
            leaf,
            getattr(type(node), "memory", None) == HOST,
            getattr(type(node), "held_whole", False),
        )
        for above, node in jax.tree_util.tree_leaves_with_path(cache, is_leaf=_says_where)
        for below, leaf in jax.tree_util.tree_leaves_with_path(node)
    )


def _says_where(node: Any) -> bool:
    return hasattr(type(node), "memory") or hasattr(type(node), "held_whole")


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache.

    Attributes:
        total: all of its arrays.
        metadata: of them, what is neither keys nor values nor codes of them: positions, statistics, scales, tables.
        host: of them, what lies in host memory.
    """

    total: int
    metadata: int
    host: int

    @classmethod
    def of(cls, cache: Iterable[Part], size: Callable[[Part], int] | None = None) -> "CacheBytes":
        """Of a cache's parts.

        Args:
            size: bytes of one part; None: all that its shape and dtype come to.
        """
        sizes = [(part, array_bytes(part.array) if size is None else size(part)) for part in cache]
        return cls(
            sum(each for _, each in sizes),
            sum(each for part, each in sizes if not part.content),
            sum(each for part, each in sizes if part.host),
        )

    @property
    def device(self) -> int:
        """What lies in device memory."""
        return self.total - self.host


def array_bytes(array: Any) -> int:
    """Bytes of an array, a tracer, a shape or an abstract value."""
    return array.size * array.dtype.itemsize


def as_bfloat16(cache: KVCache) -> int:
    """Bytes that a cache would take with its floating-point arrays in bfloat16."""
    return sum(
        leaf.size * 2 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.nbytes for leaf in jax.tree.leaves(cache)
    )
