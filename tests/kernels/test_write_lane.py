"""Claims about writing one slot a head where slots are last: that slot and nothing else, by every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kvx.kernels.write_lane import write_lane


def problem(seed, batch, heads, width, slots, dtype=jnp.float32):
    """An array, slots of which some lie beyond the end, rows, and what should come out."""
    random = np.random.default_rng(seed)
    array = np.asarray(jnp.asarray(random.standard_normal((batch, heads, width, slots)), dtype))
    row = np.asarray(jnp.asarray(random.standard_normal((batch, heads, width)), dtype))
    slot = random.integers(0, slots + slots // 4 + 1, (batch, heads)).astype(np.int32)
    wanted = array.copy()
    for at in np.ndindex(batch, heads):
        if slot[at] < slots:
            wanted[at][:, slot[at]] = row[at]
    return jnp.asarray(array), jnp.asarray(slot), jnp.asarray(row), wanted


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))
def test_one_slot_a_head_changes_and_none_beyond_the_end(seed, batch, heads, width, slots):
    array, slot, row, wanted = problem(seed, batch, heads, width, slots)
    np.testing.assert_array_equal(write_lane(array, slot, row, implementation="xla"), wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("heads", [3, 300])
def test_the_tpu_kernel_writes_the_same(dtype, heads):
    # 300 heads of 64 by 128 are more tiles than are in flight together.
    array, slot, row, wanted = problem(1, 2, heads, 64, 128 if heads > 3 else 384, dtype)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        found = jax.jit(lambda *arrays: write_lane(*arrays, implementation="mosaic_tpu"))(array, slot, row)
    np.testing.assert_array_equal(found, wanted)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("shape", "dtype", "sentence"),
    [
        ((1, 2, 64, 200), jnp.float32, "takes whole tiles"),
        ((1, 2, 12, 128), jnp.bfloat16, "takes whole tiles"),
        ((1, 2, 64, 128), jnp.float16, "takes bfloat16 and float32"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_and_left_to_xla(shape, dtype, sentence):
    array, slot, row = jnp.zeros(shape, dtype), jnp.zeros(shape[:2], jnp.int32), jnp.ones(shape[:3], dtype)
    with pytest.raises(ValueError, match=sentence):
        write_lane(array, slot, row, implementation="mosaic_tpu")
    assert float(write_lane(array, slot, row)[0, 1, 3, 0]) == 1
