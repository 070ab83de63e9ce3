"""Bytes that an array takes in a TPU's memory, where the last two axes of a layout lie in whole tiles.

A tile is 8 sublanes of 128 lanes; 16-bit and 8-bit values share a sublane by twos and fours; an axis of fewer than 8
lies in a tile of 2 or 4 sublanes. The compiler may order the axes as it likes and by default takes an order that pads
least: heads of 64 channels do not fill 128 lanes, so the slots lie there instead. Which is why a number of slots that
is just above a multiple of 128 costs up to 127 more.

Read off layouts that libtpu 0.0.42 chose for the arguments of decode steps; `kvx plan --check` compares.
"""

from itertools import permutations
from math import prod

LANES, SUBLANES = 128, 8
VECTOR = 1024
"""Entries of the tile of an array with one axis; 128 where that many hold it and are 32 bits wide."""


def tiled_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of an array of these axes, its padding included.

    Args:
        itemsize: bytes of one entry.
    """
    if len(shape) < 2:
        entries = prod(shape)
        tile = LANES if itemsize >= 4 and entries <= LANES else VECTOR
        return _up(entries, tile) * itemsize
    entries = prod(shape)
    padded = (
        entries // (sub * lane) * _sublanes(sub, itemsize) * _up(lane, LANES)
        for sub, lane in permutations([axis for axis in shape if axis], 2)
    )
    return min(padded) * itemsize if entries else 0


def _sublanes(axis: int, itemsize: int) -> int:
    if axis > SUBLANES // 2:
        return _up(axis, SUBLANES)
    return max(1 << (axis - 1).bit_length(), min(4 // itemsize, SUBLANES) if itemsize < 4 else 1)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
