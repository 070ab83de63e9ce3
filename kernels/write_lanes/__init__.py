"""A few slots of every head overwritten, in an array whose slots are last: codes, and on a TPU rows of narrow heads."""

from functools import partial
from importlib import import_module
from typing import Any

from jaxtyping import Array, Int, Shaped

from kvx.kernels.implementations import choose
from kvx.kernels.over_mesh import KV_HEADS, ROWS, over_mesh


def write_lanes(
    array: Shaped[Array, "B G D C"],
    blocks: Int[Array, "B G m"],
    rows: Shaped[Array, "B G m D n"],
    *,
    implementation: str | None = None,
) -> Shaped[Array, "B G D C"]:
    """The array with m blocks of n slots of each head overwritten, in place where the array is donated.

    Args:
        array: C a multiple of n.
        blocks: rising, distinct indices of blocks; one at or beyond C / n writes nothing.
        rows: what is written, of the array's dtype.
        implementation: "xla" (a scatter, for which a TPU's compiler turns the whole array about and back),
            "mosaic_tpu", or None, which picks by platform.

    Raises:
        ValueError: blocks that do not divide the slots, or what the named implementation cannot take.
    """
    slots, size = array.shape[3], rows.shape[4]
    if size < 1 or slots % size:
        raise ValueError(f"rows have blocks of {size} slots, allowed are divisors of the {slots} of the array")

    def refusal(name: str) -> str | None:
        return _module(name).refusal(array, size) if name == "mosaic_tpu" else None

    both = ROWS + KV_HEADS
    offered = {
        "xla": partial(_write, "xla"),
        "mosaic_tpu": over_mesh(partial(_write, "mosaic_tpu"), (both, both, both), both),
    }
    return choose("write_lanes", implementation, offered, refusal)(array, blocks, rows.astype(array.dtype))


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def _write(name: str, *arrays: Array) -> Array:
    return _module(name).write_lanes(*arrays)
