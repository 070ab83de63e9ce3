"""A call of an operation as data: one list of realistic shapes serves its tests, its compilation and its benchmark.

Every operation's `arg_specs.py` holds three tuples of `ArgSpec`:
NUMERIC, small enough for the float32 reference on a CPU (at most 2 GiB a case); AOT, shapes of real models, compiled
for every chip; CI, the two of AOT that every test run compiles. A fourth, GPU, may hold those that a TPU does not take.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""Topologies whose first device stands for the chip."""

CHIP_BYTES = {"v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}
"""High-bandwidth memory of one chip."""


@dataclass(frozen=True)
class Described:
    """A call's inputs without memory; flat, since operands check what they hold, and that is arrays.

    Attributes:
        shapes: and dtypes.
        tree: how they hang together.
    """

    shapes: list[jax.ShapeDtypeStruct]
    tree: Any

    @property
    def names(self) -> list[str]:
        """The argument that each belongs to."""
        _, arguments = self.tree.node_data()
        parts = zip(arguments, self.tree.children(), strict=True)
        return [name for name, part in parts for _ in range(part.num_leaves)]

    def of(self, leaves: list[Any]) -> dict[str, Any]:
        """Arguments of arrays like these."""
        return self.tree.unflatten(leaves)


@dataclass(frozen=True)
class ArgSpec:
    """One call.

    Attributes:
        name: what a table shows, such as "llama-3-8b b8 32768 int4".
        build: arrays by argument name, from a random key: valid inputs, the same for the same key.
        options: the remaining arguments, static.
        tolerance: largest error of the output against the float32 reference on the same inputs, relative to the
            reference's largest absolute value; the list's file says why.
        function: the public function's name in the operation's package; None: the operation's own.
        moved: bytes that the operation must move if not all of its inputs (a sparse read); None: inputs and outputs.
        compares: the same problem for PyTorch's and cuDNN's dense attention, if they can do it: B, H, G, T, S, D and
            "causal".
    """

    name: str
    build: Callable[[jax.Array], dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-5
    function: str | None = None
    moved: int | None = None
    compares: Mapping[str, int | bool] | None = None

    def arrays(self, seed: int = 0) -> dict[str, Any]:
        """Random inputs on the default device."""
        return jax.jit(self.build)(jax.random.key(seed))

    def described(self) -> "Described":
        """The inputs, without memory."""
        trees = []

        def leaves(key: jax.Array) -> list[jax.Array]:
            found, tree = jax.tree.flatten(self.build(key))
            trees.append(tree)
            return found

        return Described(jax.eval_shape(leaves, jax.random.key(0)), trees[0])

    def argument_bytes(self) -> int:
        """Bytes of the inputs."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.described().shapes)

    def bytes_moved(self, function: Callable[..., Any]) -> int:
        """Bytes that the call must move through the device's memory: inputs read once, outputs written once."""
        if self.moved is not None:
            return self.moved
        inputs = self.described()
        found = jax.eval_shape(
            lambda leaves: jax.tree.leaves(function(**inputs.of(leaves), **self.options)), inputs.shapes
        )
        return self.argument_bytes() + sum(leaf.size * leaf.dtype.itemsize for leaf in found)

    def __str__(self) -> str:
        return self.name
