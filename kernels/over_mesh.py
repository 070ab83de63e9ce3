"""Kernels on a mesh: an operation names the axes of its arrays that are independent, and each device runs its part.

XLA's partitioner knows nothing of what a Pallas kernel does: for TPUs it refuses such a program, for GPUs it would
gather the cache. So who traces for a mesh says so (`on_mesh`), and the operation splits itself; nothing travels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

ROWS, KV_HEADS, HEADS, WHOLE = "bgh."
"""Axes by letter: rows of a batch, KV heads (with the query heads that read them), query heads that share what they
read; and one that every device must have all of."""

_where: ContextVar[tuple[Mesh, Mapping[str, tuple[str, ...]]] | None] = ContextVar("mesh of kernels", default=None)


@contextmanager
def on_mesh(mesh: Mesh, axes: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Trace for arrays that lie on this mesh.

    What is traced inside is cached by JAX like everything else: let the mesh be static data of what is traced.

    Args:
        mesh: of automatic axes.
        axes: mesh axes by letter, the slowest first; those that do not divide an array's axis are left out.
    """
    token = _where.set((mesh, axes))
    try:
        yield
    finally:
        _where.reset(token)


def over_mesh(function: Callable[..., Any], arguments: Sequence[str], found: str) -> Callable[..., Any]:
    """The function, split over the mesh that is traced for; itself if there is none.

    ```python
    attend = over_mesh(kernel, ("bg", "bg", "bg", "b"), "bg")  # queries, keys, values by row and head; positions by row
    ```

    Args:
        function: of arrays or pytrees of them by position. Along a named axis, each entry of what it returns depends on
            the same entry of its arguments alone.
        arguments: for each of them, the letters of the leading axes of all its arrays; what has none is whole.
        found: the same for every array that it returns.
    """

    def call(*given: Any) -> Any:
        where = _where.get()
        if where is None:
            return function(*given)
        # Arrays alone, since a pytree may refuse to hold anything else, such as how they lie.
        leaves, tree = jax.tree.flatten(given)
        named = [
            names[: leaf.ndim] for names, each in zip(arguments, given, strict=True) for leaf in jax.tree.leaves(each)
        ]
        mesh, axes = where
        sizes = {
            letter: size
            for names, leaf in zip(named, leaves, strict=True)
            for letter, size in zip(names, leaf.shape, strict=False)
        }
        split = {letter: _dividing(mesh, axes.get(letter, ()), size) for letter, size in sizes.items()}

        def spec(names: str) -> PartitionSpec:
            return PartitionSpec(*(split.get(name) or None for name in names))

        def own(*leaves: Any) -> Any:
            return function(*tree.unflatten(leaves))

        inside = tuple(map(spec, named))
        # Kernels do not say along which mesh axes their outputs vary, so this cannot be checked.
        return jax.shard_map(own, mesh=mesh, in_specs=inside, out_specs=spec(found), check_vma=False)(*leaves)

    return call


def _dividing(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Those of the axes that can split an axis of this size together, the first ones first."""
    split: tuple[str, ...] = ()
    for axis in axes:
        if axis in mesh.shape and size % prod(mesh.shape[each] for each in (*split, axis)) == 0:
            split = (*split, axis)
    return split
