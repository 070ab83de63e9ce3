"""A model for evaluation: in the job's dtype, the rows of its batches over all devices."""

from typing import Any

import jax
import jax.numpy as jnp

import kvx
from kvx.decoder import Decoder
from kvx.mesh import placement_of

Loaded = tuple[Decoder, Any]
"""A model and its tokenizer."""


def load_over_devices(name: str, dtype: str | None = None) -> Loaded:
    """A model with weights on every device, so that each computes its share of a batch's rows.

    Args:
        name: what `kvx.load` takes.
        dtype: of weights and cache; None: float32 on a CPU, bfloat16 on accelerators.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("data",)) if jax.device_count() > 1 else None
    return kvx.load(name, dtype=None if dtype is None else jnp.dtype(dtype), mesh=mesh)


def rows_together(decoder: Decoder, batch: int) -> int:
    """Rows that are run at a time: as many as asked, rounded up to a multiple of the devices that the model is on."""
    placement = placement_of(decoder)
    devices = 1 if placement is None else placement.mesh.size
    return -(-batch // devices) * devices
