"""Frozen dataclasses that are pytrees: arrays are leaves, fields made with `static` are part of the structure."""

from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass, registered as a pytree node."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


def static(default: Any = MISSING) -> Any:
    """A hashable field that is part of the tree's structure: changing it compiles anew."""
    return field(default=default, metadata={"static": True})
