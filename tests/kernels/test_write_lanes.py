"""Claims about writing blocks of slots where slots are last: those slots and no others, by every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.kernels.write_lanes import write_lanes
from tests.kernels.interpreting import interpreted_without_races


def problem(seed, batch, heads, width, count, size=1, most=1, dtype=jnp.float32):
    """An array of `count` blocks, indices of which some lie beyond the end, rows, and what should come out."""
    random = np.random.default_rng(seed)

    def numbers(*shape):
        return np.asarray(jnp.asarray(100 * random.standard_normal(shape), dtype))

    array, rows = numbers(batch, heads, width, count * size), numbers(batch, heads, most, width, size)
    beyond = count + count // 4 + most
    blocks = np.sort([random.permutation(beyond)[:most] for _ in range(batch * heads)]).reshape(batch, heads, most)
    wanted = array.copy()
    for row, head, which in np.ndindex(blocks.shape):
        if (block := blocks[row, head, which]) < count:
            wanted[row, head, :, block * size : (block + 1) * size] = rows[row, head, which]
    return jnp.asarray(array), jnp.asarray(blocks, jnp.int32), jnp.asarray(rows), wanted


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_those_blocks_change_and_none_beyond_the_end(seed, sizes):
    array, blocks, rows, wanted = problem(seed, *sizes)
    np.testing.assert_array_equal(write_lanes(array, blocks, rows, implementation="xla"), wanted)


@pytest.mark.parametrize(
    ("heads", "width", "count", "size", "most", "dtype"),
    [
        (3, 64, 384, 1, 1, jnp.float32),
        (3, 64, 128, 1, 1, jnp.bfloat16),
        (300, 64, 128, 1, 1, jnp.bfloat16),  # more tiles than are in flight together
        (3, 8, 12, 32, 4, jnp.uint32),  # blocks of codes, several in one tile
        (2, 16, 3, 128, 2, jnp.uint32),
        (2, 4, 12, 32, 2, jnp.uint32),  # words of 2 bits of a head of 64
        (3, 1, 256, 1, 1, jnp.uint32),  # its ranges
    ],
)
def test_the_tpu_kernel_writes_the_same(heads, width, count, size, most, dtype):
    array, blocks, rows, wanted = problem(1, 2, heads, width, count, size, most, dtype)
    with interpreted_without_races():
        found = jax.jit(lambda *arrays: write_lanes(*arrays, implementation="mosaic_tpu"))(array, blocks, rows)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("shape", "size", "dtype", "sentence"),
    [
        ((1, 2, 64, 200), 1, jnp.float32, "takes whole tiles"),
        ((1, 2, 12, 128), 1, jnp.bfloat16, "takes whole tiles"),
        ((1, 2, 32, 128), 1, jnp.int8, "takes those of 16 and 32 bits"),
        ((1, 2, 8, 384), 48, jnp.float32, "takes divisors of 128"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_and_left_to_xla(shape, size, dtype, sentence):
    array, blocks = jnp.zeros(shape, dtype), jnp.zeros((*shape[:2], 1), jnp.int32)
    rows = jnp.ones((*shape[:2], 1, shape[2], size), dtype)
    with pytest.raises(ValueError, match=sentence):
        write_lanes(array, blocks, rows, implementation="mosaic_tpu")
    assert float(write_lanes(array, blocks, rows)[0, 1, 3, 0]) == 1


def test_blocks_that_do_not_divide_the_slots_are_refused():
    with pytest.raises(ValueError, match="blocks of 3 slots, allowed are divisors of the 8"):
        write_lanes(jnp.zeros((1, 1, 2, 8)), jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1, 1, 2, 3)))
