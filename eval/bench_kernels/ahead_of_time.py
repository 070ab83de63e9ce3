"""Kernels compiled by the real TPU compiler, no TPU needed: scoped memory, temporaries, copies.

A call fails if a temporary exceeds 1 % of its inputs (1 MiB is always allowed), or if the program holds a copy, a
transpose or a conversion of that size that ends in main memory: a cache moved or decoded shows as one of these. What
ends on the chip is a fetch. Queries and results lie as the kernel has them (`Layout.AUTO`), as in a program that goes
on; what is in the cache lies as a program's arguments do.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental.layout import Format, Layout

from kvx.eval.bench_kernels.calls import Call
from kvx.kernels.arg_spec import CHIP_BYTES, CHIPS
from kvx.kernels.implementations import compiling_for

ALLOWED = 0.01
"""Share of the inputs' bytes that temporaries, and single moved arrays, may reach."""

SMALL = 2**20
"""Bytes that are always allowed."""

_MOVES = re.compile(r"= (\w+)\[([\d,]*)\](\S*) (copy|transpose|convert)\(")
_ON_CHIP = "S(1)"
_SCOPED = re.compile(r'"memory_space":"1","offset":"\d+","size":"(\d+)"')
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one call for one chip.

    Attributes:
        fits: whether the inputs fit the chip's memory; if not, nothing was compiled. What does not fit with outputs
            and temporaries the compiler refuses.
        argument_bytes: inputs.
        temporary_bytes: scratch in main memory.
        scoped_bytes: on-chip memory (VMEM) that the largest kernel takes.
        moved: (operation, bytes) of arrays that are moved or converted, into main memory, beyond what is allowed.
        problem: the compiler's first line if it refused; None otherwise.
    """

    operation: str
    name: str
    chip: str
    fits: bool
    argument_bytes: int
    temporary_bytes: int = 0
    scoped_bytes: int = 0
    moved: tuple[tuple[str, int], ...] = ()
    problem: str | None = None

    @property
    def allowed(self) -> int:
        """Bytes that a temporary may take."""
        return max(SMALL, int(ALLOWED * self.argument_bytes))

    @property
    def good(self) -> bool:
        """Compiled, and nothing of the cache's size is made beside the cache; or too large for the chip."""
        if not self.fits:
            return True
        return self.problem is None and self.temporary_bytes <= self.allowed and not self.moved


def compile_calls(
    calls: Sequence[Call], chips: Sequence[str] = tuple(CHIPS), implementation: str = "mosaic_tpu"
) -> Iterator[Compiled]:
    """Each call for each chip. Only one process on a machine may hold the TPU compiler."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    for chip in chips:
        device = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        for call in calls:
            yield _compile(call, chip, sharding, implementation)


def _compile(call: Call, chip: str, sharding: jax.sharding.Sharding, implementation: str) -> Compiled:
    function, shapes = call.bound(implementation)
    placed = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf in shapes]
    free = Format(Layout.AUTO)
    given = [free if name == "queries" else None for name in call.spec.described().names]
    size = call.spec.argument_bytes()
    fits = size <= 0.95 * CHIP_BYTES[chip]
    name = call.spec.function or call.operation
    if not fits:
        return Compiled(name, call.spec.name, chip, False, size)
    try:
        with compiling_for("tpu"):
            compiled = jax.jit(function, in_shardings=(given,), out_shardings=free).lower(placed).compile()
    except Exception as error:  # whatever the compiler says is the result
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Compiled(name, call.spec.name, chip, True, size, problem=lines[0][:300])
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None, "the TPU compiler tells both"
    temporary = memory.temp_size_in_bytes
    scoped = max((int(found) for found in _SCOPED.findall(text)), default=0)
    allowed = max(SMALL, ALLOWED * size)
    moved = tuple((kind, amount) for kind, amount in _moves(text) if amount > allowed)
    return Compiled(name, call.spec.name, chip, True, size, temporary, scoped, moved)


def _moves(text: str) -> Iterator[tuple[str, int]]:
    """Operations that move arrays, and bytes; of what is fused, the last one, since the others never reach memory."""
    fused = False
    for line in text.splitlines():
        if not line.startswith(" "):
            fused = line.startswith("%fused_computation")
        found = _MOVES.search(line)
        if found is None or _ON_CHIP in found[3] or (fused and "ROOT" not in line):
            continue
        yield found[4], int(np.prod([int(n) for n in found[2].split(",") if n])) * _BYTES.get(found[1], 4)
