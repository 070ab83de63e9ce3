"""Rows in host memory, beside the accelerator: stored there whole, fetched by index.

What works where (jax 0.10.2, libtpu 0.0.42): arrays of memory kind "pinned_host" travel through jit, loops and donation
like others, and every operation wants all its operands in one memory. A gather by plain indexing compares them with
constants on the device and is refused; `lax.gather` with promised indices, which are put on the host first, is not. The
TPU compiler accepts it only as computation of the host (`compute_on`): the array stays there as a host argument, and no
more than the gathered rows cross.
"""

from typing import Any, ClassVar

import jax
from jax.experimental import compute_on as _module
from jaxtyping import Array, Int, Shaped

from kvx.pytree import pytree

compute_on: Any = getattr(_module, "compute_on2", None) or _module.compute_on
"""The form that takes a function: `compute_on2` until jax 0.11, `compute_on` since."""

HOST = "pinned_host"
"""The memory kind; CPU, GPU and TPU name it alike."""

_ROWS = jax.lax.GatherDimensionNumbers(
    offset_dims=(3,),
    collapsed_slice_dims=(2,),
    start_index_map=(2,),
    operand_batching_dims=(0, 1),
    start_indices_batching_dims=(0, 1),
)


@pytree
class OnHost:
    """An array whose bytes lie on the host: part of `cache.nbytes`, counted apart by `cache.host_nbytes`.

    Attributes:
        memory: class attribute; the memory kind that it is kept in on a mesh too.
    """

    rows: Shaped[Array, "B G S V"]
    memory: ClassVar[str] = HOST

    @classmethod
    def put(cls, rows: Shaped[Array, "B G S V"]) -> "OnHost":
        """Moved to the host; inside jit too."""
        return cls(jax.device_put(rows, jax.memory.Space.Host))

    def fetch(self, index: Int[Array, "B G N"]) -> Shaped[Array, "B G N V"]:
        """Rows at `index` on the device. Every index must lie in [0, S)."""
        wanted = jax.device_put(index[..., None], jax.memory.Space.Host)

        @compute_on(compute_type="device_host", out_memory_spaces=jax.memory.Space.Device)
        def gather(rows, index):
            return jax.lax.gather(
                rows,
                index,
                _ROWS,
                slice_sizes=(1, 1, 1, rows.shape[-1]),
                mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
            )

        return gather(self.rows, wanted)

    def whole(self) -> Shaped[Array, "B G S V"]:
        """All rows on the device, for reports and tests."""
        return jax.device_put(self.rows, jax.memory.Space.Device)
