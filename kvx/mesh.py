"""Meshes: one table of rules says which axis of weights and cache lies on which mesh axis; the compiler does the rest.

Policies, stores and models know nothing of it. Weights are placed by the names of their axes, prompts by their rows,
and a cache by the convention that every array of it begins with rows and, if it has them, KV heads. No operation of
the layer loop mixes rows, and only a model's output projections mix heads, so a cache placed like that never moves.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from math import prod
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kvx.errors import BadInput
from kvx.kernels.over_mesh import HEADS, KV_HEADS, ROWS, on_mesh

Tree = TypeVar("Tree")

MeshAxis = str | tuple[str, ...] | None
"""Where a logical axis lies: on a mesh axis, on several at once, or on none."""


@dataclass(frozen=True)
class Rules:
    """For each logical axis, the mesh axis (or axes, the first one slowest) it is split over; None: held whole.

    A mesh need not have every axis named here, and an array's axis that a mesh axis does not divide (three KV heads on
    two devices) is held whole: placement never changes a result, only where its bytes are.

    Attributes:
        rows: sequences of a batch.
        kv_heads: KV heads, with the query heads that read them.
        heads: the outputs of all query heads in one axis.
        mlp: hidden units of the MLP.
        vocabulary: tokens, in the embedding and in the logits.
        embed: the model's width, in weights.
        sequence: tokens of a row, in activations between the layers.
        attention_heads: KV heads while they attend, when every row has to be whole.
    """

    rows: MeshAxis = "data"
    kv_heads: MeshAxis = "tensor"
    heads: MeshAxis = "tensor"
    mlp: MeshAxis = "tensor"
    vocabulary: MeshAxis = "tensor"
    embed: MeshAxis = None
    sequence: MeshAxis = None
    attention_heads: MeshAxis = "tensor"

    def axes(self, name: str) -> tuple[str, ...]:
        """Mesh axes of a logical axis."""
        found = getattr(self, name)
        return (found,) if isinstance(found, str) else tuple(found or ())

    @property
    def mesh_axes(self) -> set[str]:
        """Mesh axes that any rule names."""
        return {axis for field in fields(self) for axis in self.axes(field.name)}


RULES = Rules()
"""Rows over "data"; heads, MLP and vocabulary over "tensor"."""


@dataclass(frozen=True)
class Placement:
    """A mesh and the rules for it: a placed model carries one, as static data.

    An abstract mesh, without devices, says where arrays would be and how many of their bytes a device would hold.
    """

    mesh: Any
    rules: Rules

    def sharding(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], memory: str | None = None
    ) -> NamedSharding:
        """Where an array goes whose axes have these logical names (None: no rule; missing names at the end: None).

        Args:
            memory: a memory kind of the devices; None: the usual one.
        """
        used: set[str] = set()
        entries: list[MeshAxis] = []
        for size, name in zip(shape, axes, strict=False):
            split = self._split(size, () if name is None else self.rules.axes(name), used)
            used.update(split)
            entries.append(split if len(split) > 1 else next(iter(split), None))
        while entries and entries[-1] is None:
            entries.pop()
        return NamedSharding(self.mesh, PartitionSpec(*entries), memory_kind=memory)

    def _split(self, size: int, wanted: tuple[str, ...], used: set[str]) -> tuple[str, ...]:
        """Those of the wanted mesh axes that can split an array's axis of this size together, the first ones first."""
        split: tuple[str, ...] = ()
        for axis in wanted:
            # Two axes of one array cannot lie on one mesh axis: the first has it.
            free = axis in self.mesh.shape and axis not in used
            if free and size % prod(self.mesh.shape[each] for each in (*split, axis)) == 0:
                split = (*split, axis)
        return split

    def put(self, array: Any, axes: tuple[str | None, ...], memory: str | None = None) -> Any:
        """The array where it belongs: moved, constrained inside jit, or only described if it is a shape."""
        sharding = self.sharding(array.shape, axes, memory)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        if isinstance(array, Tracer):
            return jax.lax.with_sharding_constraint(array, sharding)
        return jax.device_put(array, sharding)


def on_host() -> AbstractContextManager[Any]:
    """What is made inside lies in the host's memory: a model that is to be split may be more than one device holds.

    Where JAX was told to have no CPU beside the accelerators (JAX_PLATFORMS without "cpu"), it makes no difference.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return nullcontext()


def place_model(model: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The model with every parameter on the mesh; prompts and caches of it then follow by the same rules.

    Args:
        model: a Flax module whose parameters name their axes; its values may be `jax.ShapeDtypeStruct`s.
        mesh: any shape; its axes are treated as automatic, since the compiler is to propagate shardings.
        rules: logical axis to mesh axis.

    Raises:
        BadInput: the mesh has no axis that any rule names, so that nothing would be split.
    """
    if not rules.mesh_axes & set(mesh.axis_names):
        raise BadInput(
            f"mesh has axes {list(mesh.axis_names)}, none of which a rule names; allowed: at least one of "
            f"{sorted(rules.mesh_axes)}, or rules= for other names"
        )
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    placement = Placement(automatic, rules)

    placed = place_parameters(placement, model)
    placed.placement = placement
    for block in placed.blocks:  # a layer alone, such as in a program of its own, knows it too
        block.placement = placement
    return placed


def place_parameters(placement: Placement | None, module: Tree) -> Tree:
    """A module, or a part of one, with every variable where the names of its axes put it; as it is without a placement.

    Args:
        module: holds arrays, tracers or shapes; what names no axes is held whole.
    """
    if placement is None:
        return module

    def put(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return placement.put(variable, ())
        axes = variable.get_metadata().get("axes", ())
        return variable.replace(placement.put(variable.get_value(), axes))

    return jax.tree.map(put, module, is_leaf=lambda node: isinstance(node, nnx.Variable))


def placement_of(model: Any) -> Placement | None:
    """Where `place_model` put the model; None: it is not on a mesh."""
    return getattr(model, "placement", None)


def kernels_on(placement: Placement | None) -> AbstractContextManager[None]:
    """Trace kernels for arrays that lie by this placement; it has to be static data of what is traced."""
    if placement is None:
        return nullcontext()
    rules = placement.rules
    axes = {ROWS: rules.axes("rows"), KV_HEADS: rules.axes("kv_heads"), HEADS: rules.axes("heads")}
    return on_mesh(placement.mesh, axes)


def place_rows(placement: Placement | None, tree: Tree) -> Tree:
    """Arrays whose first axis is rows, split like every batch; unchanged without a placement."""
    return tree if placement is None else jax.tree.map(lambda array: placement.put(array, ("rows",)), tree)


def place_cache(placement: Placement | None, layer: Tree, rows: int, kv_heads: int) -> Tree:
    """One layer's part of a cache, split by rows and KV heads; unchanged without a placement.

    An array's first axis is taken for rows if it has as many entries, and its second for KV heads likewise. What has
    no head axis (one run of slots for all heads, a count per row), or one of only some heads (stores by head), is split
    by rows only. Parts that say so (`held_whole`) are not split at all, parts that name a `memory` stay in it.

    Propagation alone places what is computed from tokens; arrays born inside (a pool of zeros) need to be told.

    Args:
        layer: any pytree of cache arrays, or of their shapes.
        rows: sequences in the batch.
        kv_heads: of the layer.
    """
    if placement is None:
        return layer

    def put(leaf: Any, memory: str | None = None) -> Any:
        if part_memory := getattr(type(leaf), "memory", None):
            return jax.tree.map(lambda array: put(array, part_memory), leaf)
        # Such as rotary frequencies, weights that a store carries along; their count may happen to equal the rows.
        if _held_whole(leaf):
            return jax.tree.map(lambda array: placement.put(array, ()), leaf)
        by_rows = leaf.shape[:1] == (rows,)
        by_heads = by_rows and leaf.shape[1:2] == (kv_heads,)
        return placement.put(leaf, ("rows" if by_rows else None, "kv_heads" if by_heads else None), memory)

    return jax.tree.map(put, layer, is_leaf=lambda node: _held_whole(node) or hasattr(type(node), "memory"))


def _held_whole(node: Any) -> bool:
    return getattr(type(node), "held_whole", False)
