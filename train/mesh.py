"""The mesh of a training run: its four axes, which arrays lie along which of them, and each process's share of them.

The rules are one table (`kvx.mesh.Rules`) for parameters, their optimizer state, activations and caches. Along "data"
and "fsdp" every device has rows of its own; along "fsdp" it also holds a share of every parameter, gathered layer by
layer as it is needed (Rajbhandari et al. 2020, ZeRO stage 3); along "tensor" a share of every layer's heads and hidden
units (Shoeybi et al. 2019); along "sequence" a share of every row's tokens, exchanged for heads while they attend
(Jacobs et al. 2023, DeepSpeed-Ulysses).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from kvx.errors import BadInput
from kvx.mesh import Placement, Rules
from kvx.train.job import MeshSection

AXES = ("data", "fsdp", "tensor", "sequence")

TRAINING = Rules(
    rows=("data", "fsdp"),
    kv_heads="tensor",
    heads="tensor",
    mlp="tensor",
    vocabulary="tensor",
    embed="fsdp",
    sequence="sequence",
    attention_heads=("tensor", "sequence"),
)
"""Where everything of a training run lies."""

ALONG_ROWS = MeshSection()
"""All devices along "data"."""

GATHERED = replace(TRAINING, embed=None)
"""Where a layer's weights lie while it computes."""


def make_placement(section: MeshSection = ALONG_ROWS, devices: Sequence[Any] | None = None) -> Placement:
    """The mesh of a job with the rules of training.

    Args:
        section: sizes of the axes.
        devices: None: all there are, of all processes.

    Raises:
        BadInput: axes that do not make up the devices.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = section.sizes(len(found))
    shape = tuple(sizes[axis] for axis in AXES)
    # A real machine's devices are ordered so that the fastest-changing axes are neighbours on its network.
    if devices is None and jax.process_count() == 1 and found[0].platform != "cpu":
        return Placement(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES)), TRAINING)
    return Placement(Mesh(np.array(found).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)), TRAINING)


def check_batch(placement: Placement, rows: int, parts: int, tokens: int) -> None:
    """Refuse a batch that the mesh does not divide, before anything is loaded or compiled.

    Args:
        rows: sequences of a step.
        parts: that a step's batch is cut into, one after the other.
        tokens: of a row.

    Raises:
        BadInput: rows of a part that the devices along "data" and "fsdp" do not share, or tokens that those along
            "sequence" do not.
    """
    shape = placement.mesh.shape
    copies = shape["data"] * shape["fsdp"]
    if rows % (parts * copies):
        raise BadInput(
            f"batch={rows} with accumulate={parts}; allowed: a multiple of {parts * copies}, since the mesh has "
            f"data={shape['data']} and fsdp={shape['fsdp']}"
        )
    if tokens % shape["sequence"]:
        raise BadInput(f"sequence={tokens} tokens; allowed: a multiple of sequence={shape['sequence']} of the mesh")


def row_share(placement: Placement) -> tuple[int, int]:
    """Which share of a batch's rows this process has to bring, and how many shares there are."""
    shape = placement.mesh.shape
    owners = [
        [each.process_index for each in row]
        for row in placement.mesh.devices.reshape(shape["data"] * shape["fsdp"], -1)
    ]
    return share_of_rows(owners, jax.process_index())


def share_of_rows(owners: Sequence[Sequence[int]], process: int) -> tuple[int, int]:
    """A process's share and their number; those that hold other heads or tokens of the same rows bring the same rows.

    Args:
        owners: for each part of the rows, in order, the processes of the devices that hold some of it.
    """
    held: dict[int, set[int]] = {}
    for part, processes in enumerate(owners):
        for each in processes:
            held.setdefault(each, set()).add(part)
    shares = sorted({tuple(sorted(parts)) for parts in held.values()})
    return shares.index(tuple(sorted(held[process]))), len(shares)
