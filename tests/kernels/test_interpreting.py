"""What the interpreter of TPU kernels is trusted with: a race in any kernel of a program is seen."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.interpreting import interpreted_without_races


def copied(array: jax.Array, *, early: bool) -> jax.Array:
    """A copy by way of VMEM, which is read before it has arrived if `early`."""

    def kernel(source, out, here, arrived):
        moving = pltpu.make_async_copy(source, here, arrived)
        moving.start()
        if not early:
            moving.wait()
        out[...] = here[...]
        if early:
            moving.wait()

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(array.shape, array.dtype),
        scratch_shapes=[pltpu.VMEM(array.shape, array.dtype), pltpu.SemaphoreType.DMA],
    )(array)


@pytest.mark.parametrize("early", [(False, False), (True, False), (False, True)], ids=["none", "first", "second"])
def test_a_race_in_any_kernel_is_seen(early):
    first, second = early

    def run():
        with interpreted_without_races():
            both = jax.jit(lambda array: copied(copied(array, early=first), early=second))
            both(jnp.ones((8, 128))).block_until_ready()

    if any(early):
        with pytest.raises(AssertionError, match="raced"):
            run()
    else:
        run()


def test_a_program_without_kernels_is_not_taken_for_one_without_races():
    with pytest.raises(AssertionError, match="no kernel"), interpreted_without_races():
        jnp.ones(3).block_until_ready()
