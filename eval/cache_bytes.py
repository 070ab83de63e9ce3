"""What a cache's bytes are: keys and values in whatever form, what says which they are, and what lies on the host."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

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
    def of(cls, cache: Any, size: Callable[[Any], int] | None = None) -> "CacheBytes":
        """Of arrays, or of their shapes.

        Args:
            size: bytes of one leaf; None: all that its shape and dtype come to.
        """
        sizes = [(path, on_host, (size or array_bytes)(leaf)) for path, on_host, leaf in _leaves(cache)]
        return cls(
            sum(each for _, _, each in sizes),
            sum(each for path, _, each in sizes if not is_content(path)),
            sum(each for _, on_host, each in sizes if on_host),
        )

    @property
    def device(self) -> int:
        """What lies in device memory."""
        return self.total - self.host


def array_bytes(leaf: Any) -> int:
    """Bytes of an array, a tracer or a shape."""
    return leaf.size * leaf.dtype.itemsize


def is_content(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at a path of the cache's tree is keys, values or codes; statistics are those in a dict."""
    if any(isinstance(step, jax.tree_util.DictKey) for step in path):
        return False
    names = [step.name for step in path if isinstance(step, jax.tree_util.GetAttrKey)]
    return bool(names) and names[-1] in CONTENT


def _leaves(cache: Any) -> Iterator[tuple[tuple[Any, ...], bool, Any]]:
    """Every array with its path, and whether its part of the tree says that it lives on the host."""
    parts = jax.tree_util.tree_leaves_with_path(cache, is_leaf=_on_host)
    for above, part in parts:
        for below, leaf in jax.tree_util.tree_leaves_with_path(part):
            yield (*above, *below), _on_host(part), leaf


def _on_host(node: Any) -> bool:
    return getattr(type(node), "memory", None) == HOST
