"""True positions of listed rows on a TPU: copied by the lanes that hold them, then brought into the order of a block.

Positions lie slots last, and copies of them start and end at whole lanes of 128, where neither runs nor narrow pages
do: the lanes around a piece are copied, and rolled to its place on the chip. Nothing is gathered in main memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from kvx.kernels.implementations import LANES
from kvx.kernels.ragged_decode_attention.reads import Reads

SUBLANES = 8


@dataclass(frozen=True)
class Positions:
    """How the positions of a block are fetched, in pieces: pages or lanes of them, or all of it where it is of a run.

    Attributes:
        shape: (A, R, C) of the positions.
        turned: they are copied from (R, A, C).
        piece: slots of a piece.
        pieces: of a block.
        reach: lanes that are copied for a piece.
    """

    shape: tuple[int, int, int]
    turned: bool
    piece: int
    pieces: int
    reach: int

    @classmethod
    def of(cls, reads: Reads, block: int) -> "Positions":
        """For blocks of so many slots."""
        *lead, last, slots = reads.key_positions.shape  # type: ignore[union-attr]
        first = prod(lead)
        # Of the axes before the slots, the compiler lets that one share tiles with them which fills these better.
        turned = bool(lead) and _tiled(last) * first > last * _tiled(first)
        if reads.table is None:
            return cls((first, last, slots), turned, block, 1, _whole(block) + LANES)
        piece = min(reads.page, LANES)
        return cls((first, last, slots), turned, piece, block // piece, LANES)

    def held(self, positions: Int[Array, "*lead C"]) -> Int[Array, "A R c"]:
        """What is copied from: the positions where they are, or padded if they do not end at whole lanes."""
        positions = positions.reshape(self.shape)
        positions = jnp.swapaxes(positions, 0, 1) if self.turned else positions
        return jnp.pad(positions, ((0, 0), (0, 0), (0, self._lanes - self.shape[2])))

    @property
    def buffers(self) -> Any:
        """Memory for two blocks."""
        return pltpu.VMEM((2, self.pieces, self.reach), jnp.int32)

    def around(self, ref: Any, own: Any, first: Any) -> Any:
        """What is copied for the piece that begins at row `first`; row `own` is one of the same list."""
        line = lax.div(own, jnp.int32(self.shape[2]))
        outer, inner = lax.div(line, jnp.int32(self.shape[1])), lax.rem(line, jnp.int32(self.shape[1]))
        where = (inner, outer) if self.turned else (outer, inner)
        lanes = pl.ds(pl.multiple_of(self._start(own, first), LANES), self.reach)
        return ref.at[(*where, lanes)]

    def offset(self, own: Any, first: Any) -> Any:
        """Lane of what is copied at which the piece begins; below 0 if it begins before the positions do."""
        return self._lane(own, first) - self._start(own, first)

    def in_order(self, buffer: Any, offset: Callable[[int], Any]) -> Any:
        """Positions (1, block) by slot of the block.

        Args:
            buffer: (pieces, reach), what was copied.
            offset: of each piece; anything for one that the list does not have.
        """
        together = max(LANES // self.piece, 1)

        def rolled(index: int) -> Any:
            """A piece, at its place among those that share lanes."""
            by = index % together * self.piece - offset(index)
            return pltpu.roll(buffer[index : index + 1], lax.rem(by + 2 * self.reach, jnp.int32(self.reach)), axis=1)

        lane = lax.broadcasted_iota(jnp.int32, (1, self.reach), 1)
        rows = []
        for first in range(0, self.pieces, together):
            row = rolled(first)
            for index in range(first + 1, min(first + together, self.pieces)):
                row = jnp.where(lane < index % together * self.piece, row, rolled(index))
            rows.append(row[:, : together * self.piece])
        return jnp.concatenate(rows, axis=1)[:, : self.pieces * self.piece]

    @property
    def _lanes(self) -> int:
        return max(_whole(self.shape[2]), self.reach)

    def _lane(self, own: Any, first: Any) -> Any:
        return first - own + lax.rem(own, jnp.int32(self.shape[2]))

    def _start(self, own: Any, first: Any) -> Any:
        lane = self._lane(own, first)
        return jnp.clip(lane - lax.rem(lane, jnp.int32(LANES)), 0, self._lanes - self.reach)


def _whole(slots: int) -> int:
    return slots + -slots % LANES


def _tiled(lines: int) -> int:
    """Lines that so many take in tiles of memory."""
    return next((tile for tile in (1, 2, 4) if lines <= tile), -(-lines // SUBLANES) * SUBLANES)
