"""One slot of every head overwritten, in a cache whose slots lie along the lanes: a head dim below 128 on a TPU."""

from functools import partial
from importlib import import_module
from typing import Any

from jaxtyping import Array, Float, Int

from kvx.kernels.implementations import choose
from kvx.kernels.over_mesh import KV_HEADS, ROWS, over_mesh

NAMES = ("xla", "mosaic_tpu")
"""Implementations: one file each, loaded when it is first asked for."""


def write_lane(
    array: Float[Array, "B G D C"],
    slot: Int[Array, "B G"],
    row: Float[Array, "B G D"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B G D C"]:
    """The array with `row` at slot `slot` of each head, written in place where the array is donated.

    Args:
        array: float32 or bfloat16.
        slot: from 0; one at or beyond C writes nothing.
        row: of the array's dtype.
        implementation: "xla" (a scatter, for which a TPU's compiler turns the whole cache about and back),
            "mosaic_tpu", or None, which picks by platform.

    Raises:
        ValueError: shapes that do not fit together, or that the named implementation cannot take.
    """
    if slot.shape != array.shape[:2] or row.shape != array.shape[:3]:
        wanted = f"{array.shape[:2]} and {array.shape[:3]}"
        raise ValueError(f"slot and row have shapes {slot.shape} and {row.shape}, allowed are {wanted}")
    both = ROWS + KV_HEADS
    offered = {
        "xla": partial(_write, "xla"),
        "mosaic_tpu": over_mesh(partial(_write, "mosaic_tpu"), (both, both, both), both),
    }

    def refusal(name: str) -> str | None:
        return _module(name).refusal(array) if name == "mosaic_tpu" else None

    return choose("write_lane", implementation, offered, refusal)(array, slot, row.astype(array.dtype))


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def _write(name: str, *arrays: Array) -> Array:
    return _module(name).write_lane(*arrays)
