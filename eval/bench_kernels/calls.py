"""Every operation's calls: the function, its implementations, and the shapes of its lists."""

import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

import kvx.kernels
from kvx.errors import unknown
from kvx.kernels.arg_spec import ArgSpec


@dataclass(frozen=True)
class Call:
    """One operation on one list entry.

    Attributes:
        operation: the folder's name.
        function: the public function, which takes `implementation=`.
        spec: shapes and options.
    """

    operation: str
    function: Callable[..., Any]
    spec: ArgSpec

    def bound(
        self, implementation: str | None, **more: Any
    ) -> tuple[Callable[[list[Any]], Any], list[jax.ShapeDtypeStruct]]:
        """The call as a function of its arrays, flat, and what they are (`ArgSpec.described`)."""
        options = dict(self.spec.options) | {"implementation": implementation} | more
        inputs = self.spec.described()
        return lambda leaves: self.function(**inputs.of(leaves), **options), inputs.shapes

    def arrays(self, seed: int = 0) -> list[jax.Array]:
        """Random arrays, flat."""
        return jax.tree.leaves(self.spec.arrays(seed))

    def __str__(self) -> str:
        name = self.spec.function or self.operation
        return f"{name}: {self.spec.name}"


def operations() -> tuple[str, ...]:
    """Names of the operations that list shapes."""
    found = []
    for module in pkgutil.iter_modules(kvx.kernels.__path__):
        if module.ispkg and importlib.util.find_spec(f"kvx.kernels.{module.name}.arg_specs"):
            found.append(module.name)
    return tuple(sorted(found))


def calls(which: str, only: tuple[str, ...] = (), matching: tuple[str, ...] = ("",)) -> Iterator[Call]:
    """The calls of one list of every operation, or of some.

    Args:
        which: "NUMERIC", "AOT", "CI" or "GPU", which not every operation has.
        only: operations; none: all.
        matching: texts of which an entry's name contains one.

    Raises:
        BadInput: an operation that there is not.
    """
    everything = operations()
    for name in only:
        if name not in everything:
            raise unknown("operation", name, everything)
    for name in only or everything:
        package = importlib.import_module(f"kvx.kernels.{name}")
        for spec in getattr(importlib.import_module(f"kvx.kernels.{name}.arg_specs"), which, ()):
            if any(text in spec.name for text in matching):
                yield Call(name, getattr(package, spec.function or name), spec)


def implementations(operation: str) -> tuple[str, ...]:
    """Names of the files that implement an operation, the reference apart."""
    package = importlib.import_module(f"kvx.kernels.{operation}")
    files = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return tuple(name for name in ("xla", "mosaic_tpu", "triton") if name in files)


def candidates(operation: str, implementation: str) -> tuple[Any, ...]:
    """Tunings that the implementation's file offers to try; none if it has none."""
    module = importlib.import_module(f"kvx.kernels.{operation}.{implementation}")
    return tuple(getattr(module, "CANDIDATES", ()))
