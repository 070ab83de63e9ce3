"""Frozen dataclasses that are pytrees and are rebuilt without their constructor, whatever stands where arrays do.

JAX puts shapes, block specs and bare markers into the trees that it rebuilds; a constructor that checks its arrays
(as all do in the tests) would refuse them. Fields whose metadata say "static" belong to the structure.
"""

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass, registered as a pytree node."""
    made: Any = dataclass(frozen=True)(cls)
    arrays = [entry.name for entry in fields(made) if not entry.metadata.get("static")]
    static = [entry.name for entry in fields(made) if entry.metadata.get("static")]

    def flatten(node):
        return [getattr(node, name) for name in arrays], tuple(getattr(node, name) for name in static)

    def flatten_with_keys(node):
        children, structure = flatten(node)
        keys = [jax.tree_util.GetAttrKey(name) for name in arrays]
        return list(zip(keys, children, strict=True)), structure

    def unflatten(structure, children):
        node = object.__new__(made)
        for name, value in (*zip(arrays, children, strict=True), *zip(static, structure, strict=True)):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made
