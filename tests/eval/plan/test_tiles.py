"""Claims about tiles: sizes that libtpu reported for layouts it chose, and what padding cannot do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.plan.tiles import tiled_bytes


@pytest.mark.parametrize(
    ("shape", "itemsize", "entries"),
    [
        ((8, 3, 2176, 64), 2, 8 * 3 * 2176 * 64),  # slots in the lanes
        ((8, 3, 129, 64), 2, 8 * 3 * 256 * 64),  # one slot above 128 costs 127 more
        ((8, 3, 4, 640), 4, 8 * 3 * 4 * 640),  # four sublanes
        ((8, 3, 2, 640), 4, 8 * 3 * 2 * 640),
        ((8, 3, 20, 64), 4, 8 * 3 * 20 * 128),  # rows in the sublanes, 64 channels in 128 lanes
        ((8, 3, 129), 4, 8 * 3 * 256),
        ((8, 3), 4, 4 * 128),
        ((8,), 4, 128),
        ((576,), 2, 1024),
        ((), 4, 128),
    ],
)
def test_layouts_of_the_compiler(shape, itemsize, entries):
    assert tiled_bytes(shape, itemsize) == entries * itemsize


@given(st.lists(st.integers(1, 300), max_size=4), st.sampled_from([1, 2, 4]))
def test_padding_adds_bytes_and_whole_tiles_have_none(shape, itemsize):
    bare = itemsize
    for axis in shape:
        bare *= axis
    assert tiled_bytes(tuple(shape), itemsize) >= bare
    whole = (*shape, 8, 128)
    assert tiled_bytes(whole, itemsize) == bare * 8 * 128


def test_nothing_takes_nothing():
    assert tiled_bytes((8, 3, 0, 64), 2) == 0 and tiled_bytes((0,), 4) == 0
