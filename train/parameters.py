"""A model taken apart into named arrays and put together again: what trains, what is frozen, what is kept."""

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike

from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.mesh import Placement

Arrays = dict[str, Any]
"""Arrays of a model by their paths, as "blocks.0.attention.out.kernel"."""

Leaf = TypeVar("Leaf")

CONVERTED = "attention"
"""The subset of parameters that a conversion made."""


class Frame:
    """A model without its arrays.

    Attributes:
        axes: for each name, the logical axes of its array.
        parameters: names of what can be trained; the others are constants, such as rotary frequencies.
    """

    def __init__(self, model: Decoder):
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_variable)
        self._leaves = {jax.tree_util.keystr(path, simple=True, separator="."): _emptied(leaf) for path, leaf in leaves}
        self.axes: dict[str, tuple[str | None, ...]] = {
            name: leaf.get_metadata().get("axes", ()) if _is_variable(leaf) else ()
            for name, leaf in self._leaves.items()
        }
        self.parameters = frozenset(name for name, leaf in self._leaves.items() if isinstance(leaf, nnx.Param))

    def arrays(self, model: Decoder) -> Arrays:
        """The arrays of a model of this frame."""
        leaves = jax.tree.leaves(model, is_leaf=_is_variable)
        return dict(zip(self._leaves, map(_value, leaves), strict=True))

    def model(self, arrays: Mapping[str, Any]) -> Any:
        """The model that has these arrays."""
        filled = [
            leaf.replace(arrays[name]) if _is_variable(leaf) else arrays[name] for name, leaf in self._leaves.items()
        ]
        return jax.tree.unflatten(self._tree, filled)

    def chosen(self, train: str, converted: Collection[int] | None = None) -> frozenset[str]:
        """Names of the parameters that train.

        Args:
            train: "all"; "attention": that of the converted layers; or a regular expression found in the names.
            converted: those layers; None: all.

        Raises:
            BadInput: an expression that finds nothing.
        """
        if train == "all":
            return self.parameters
        layers = r"\d+" if converted is None else "|".join(map(str, converted))
        pattern = re.compile(rf"^blocks\.({layers})\.attention\." if train == CONVERTED else train)
        found = frozenset(name for name in self.parameters if pattern.search(name))
        if not found:
            example = ", ".join(sorted(self.parameters)[:3])
            raise BadInput(
                f"train={train!r} finds no parameter; allowed: 'all', or an expression found in {example}, ..."
            )
        return found

    def placed(self, placement: Placement, arrays: Mapping[str, Any]) -> Arrays:
        """The arrays where the rules say; they may be shapes, or tracers."""
        return {name: placement.put(array, self.axes[name]) for name, array in arrays.items()}


def converted_layers(model: Decoder) -> tuple[int, ...] | None:
    """Those whose attention is latent; None: there are none, and train="attention" means all."""
    return tuple(layer for layer, block in enumerate(model.blocks) if block.spec.latent) or None


def cast(arrays: Mapping[str, Any], names: Collection[str], dtype: DTypeLike) -> Arrays:
    """The arrays, those that are named in another dtype; they may be shapes."""

    def changed(array: Any) -> Any:
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, dtype, sharding=array.sharding)
        return array.astype(dtype)

    return {name: changed(array) if name in names else array for name, array in arrays.items()}


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _value(leaf: Any) -> Any:
    return leaf.get_value() if _is_variable(leaf) else leaf


def _emptied(leaf: Any) -> Any:
    """Its name, axes and shape only: a frame outlives many versions of its arrays."""
    value = _value(leaf)
    shape = jax.ShapeDtypeStruct(value.shape, value.dtype)
    return leaf.replace(shape) if _is_variable(leaf) else shape
