"""Attention over caches that lie on a mesh: heads over one axis, slots over another, merged by log-sum-exp.

Heads need no exchange at all. Where slots are split (context-parallel decoding), every device attends over the slots
that it holds, and only outputs and log-sum-exps travel: no cache is ever gathered.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from kvx.kernels.merge_partials import Partial, merge_across

OF_NO_SLOT = ("queries", "query_positions")
"""Arguments that every device may have all of, since no slot is told by them."""

OF_ALL_SLOTS = ("starts", "lengths", "tail")
"""... and those that are told of the slots of all devices together: each takes what is its own."""


def sharded_attention(
    attention: Callable[..., Partial],
    mesh: Mesh,
    specs: Mapping[str, Any],
    *,
    slots: str | None = None,
    out: PartitionSpec | None = None,
) -> Callable[..., Partial]:
    """An operation of this package as one over a mesh, in the shape of the operation: arrays by name in, a partial out.

    ```python
    specs = slot_specs(slots="context", heads="tensor")
    heads = PartitionSpec(None, "tensor")
    attend = sharded_attention(partial(decode_attention, scale=0.125), mesh, specs, slots="context", out=heads)
    part = attend(queries=q, keys=k, values=v, query_positions=p, key_positions=s)
    ```

    Args:
        attention: `decode_attention`, `ragged_decode_attention`, `latent_decode_attention` and the like, their static
            options bound.
        mesh: its axes are those that `specs` name; they are treated as automatic, so that inputs may lie anyhow.
        specs: how each argument lies on the mesh, by name: a `PartitionSpec`, or a pytree of them for a pytree; absent:
            every device has all of it. See `slot_specs` and `latent_specs`.
        slots: mesh axis that the slots are split over, equally and in order. Then every slot must carry its position
            (`key_positions`), and what is told by slot must lie so. `starts` and `lengths` count the slots of all
            devices; a `tail` that lies whole is read by the first of them. What chooses slots by index (`table`,
            `chosen`) is refused.
        out: how the leading axes of the output (and of its log-sum-exp) lie; it never names the axis of the slots.
            None: every device has all of it.

    Raises:
        ValueError: at the call, if an axis of an array is no multiple of the devices it is split over, or if slots are
            split and have no positions, or something that is told by slot is not split with them.
    """
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def attend(**arrays: Any) -> Partial:
        if slots is not None and arrays.get("key_positions") is None:
            raise ValueError(f"key_positions is None, allowed with slots split over {slots!r}: positions of all slots")
        placed = {
            name: _leaf_specs(name, array, specs.get(name, PartitionSpec()), mesh) for name, array in arrays.items()
        }
        split = {name for name, spec in placed.items() if slots is not None and _names_alone(spec, slots)}
        for name in arrays:
            if slots is not None and arrays[name] is not None and name not in {*split, *OF_NO_SLOT, *OF_ALL_SLOTS}:
                allowed = f"with slots split over {slots!r}: a spec with {slots!r} alone along one axis"
                raise ValueError(f"{name} lies as {specs.get(name, PartitionSpec())}, allowed {allowed}")

        def local(parts: dict[str, Any]) -> Partial:
            if slots is None:
                return attention(**parts)
            whole = {name: part for name, part in parts.items() if name in OF_ALL_SLOTS and name not in split}
            return merge_across(attention(**parts | _own(whole, parts["key_positions"].shape[-1], slots)), slots)

        whole = PartitionSpec()
        # Kernels do not say along which mesh axes their outputs vary, so this cannot be checked.
        over_mesh = jax.shard_map(
            local, mesh=automatic, in_specs=(placed,), out_specs=whole if out is None else out, check_vma=False
        )
        return over_mesh(arrays)

    return attend


def slot_specs(*, heads: str | None = None, slots: str | None = None, rows: str | None = None) -> dict[str, Any]:
    """Specs of `decode_attention`'s arguments by the mesh axes of G, C and B; keys and values are (B, G, C, D) here.

    A tail lies whole along the slots' axis. Operands of other layouts take a spec of their own, such as for
    `ChannelCodes` `jax.tree.unflatten(jax.tree.structure(keys), [words, ranges])`.
    """
    by_slot = PartitionSpec(rows, heads, slots)
    return {
        **dict.fromkeys(("queries", "lengths", "tail"), PartitionSpec(rows, heads)),
        "query_positions": PartitionSpec(rows),
        **dict.fromkeys(("keys", "values", "key_positions", "bias"), by_slot),
    }


def latent_specs(
    *, heads: str | None = None, slots: str | None = None, rows: str | None = None, slots_last: bool = False
) -> dict[str, Any]:
    """Specs of `latent_decode_attention`'s arguments by the mesh axes of H, C and B; heads share the rows."""
    return {
        "queries": PartitionSpec(rows, None, heads),
        "query_positions": PartitionSpec(rows),
        "rows": PartitionSpec(rows, None, slots) if slots_last else PartitionSpec(rows, slots),
        **dict.fromkeys(("key_positions", "bias"), PartitionSpec(rows, slots)),
    }


def _own(whole: dict[str, Any], count: int, axis: str) -> dict[str, Any]:
    """A device's part of what is told of all slots, of which it holds the next `count`; inside `jax.shard_map`."""
    device, own = jax.lax.axis_index(axis), {}
    if whole.get("lengths") is not None:
        starts = whole.get("starts", 0)
        begin, end = (jnp.clip(at - device * count, 0, count) for at in (starts, starts + whole["lengths"]))
        own = {"lengths": end - begin} | ({"starts": begin} if "starts" in whole else {})
    if whole.get("tail") is not None:
        tail = whole["tail"]
        own["tail"] = replace(tail, positions=jnp.where(device == 0, tail.positions, -1))
    return own


def _names_alone(specs: Any, axis: str) -> bool:
    """Whether all arrays of an argument have an axis of their own along this one."""
    leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return bool(leaves) and all(any(names in (axis, (axis,)) for names in spec) for spec in leaves)


def _leaf_specs(name: str, tree: Any, spec: Any, mesh: Mesh) -> Any:
    """A spec for each array of an argument, once they are known to divide."""
    whole = isinstance(spec, PartitionSpec)
    specs = jax.tree.map(lambda leaf: spec, tree) if whole else spec
    for leaf, entry in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
        for axis, names in enumerate(entry):
            devices = 1
            for mesh_axis in (names,) if isinstance(names, str) else names or ():
                devices *= mesh.shape[mesh_axis]
            if axis >= leaf.ndim or leaf.shape[axis] % devices:
                size = leaf.shape[axis] if axis < leaf.ndim else None
                allowed = f"multiples of the {devices} devices along {names!r}"
                raise ValueError(f"{name} has {size} along axis {axis}, allowed: {allowed}")
    return specs
