"""Claims about operations split over a mesh: each device has its part, nothing travels, what cannot be is whole."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kvx.kernels.decode_attention import decode_attention
from kvx.kernels.over_mesh import KV_HEADS, ROWS, on_mesh, over_mesh

BOTH = ROWS + KV_HEADS
AXES = {ROWS: ("data",), KV_HEADS: ("tensor",)}

needs_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def split_sum(shapes):
    """Sums over the last axis of a batch by row and head, plus a number a row; notes the shapes that it was given."""

    def plain(x, row):
        shapes.append((x.shape, row.shape))
        return jnp.sum(x, axis=-1) + row[:, None]

    return over_mesh(plain, [BOTH, ROWS], BOTH)


def arguments(rows, heads):
    x = np.random.default_rng(0).standard_normal((rows, heads, 5)).astype(np.float32)
    return x, np.arange(rows, dtype=np.float32)


def test_without_a_mesh_it_is_the_function():
    x, row = arguments(4, 2)
    shapes = []
    np.testing.assert_allclose(split_sum(shapes)(x, row), x.sum(-1) + row[:, None], rtol=1e-6)
    assert shapes == [((4, 2, 5), (4,))]


@needs_devices
@pytest.mark.parametrize(
    ("rows", "heads", "part"),
    [(8, 4, ((2, 2, 5), (2,))), (8, 3, ((2, 3, 5), (2,))), (3, 4, ((3, 2, 5), (3,))), (1, 1, ((1, 1, 5), (1,)))],
)
def test_each_device_has_its_rows_and_heads_and_what_does_not_divide_is_whole(rows, heads, part):
    x, row = arguments(rows, heads)
    shapes = []
    with on_mesh(mesh(), AXES):
        found = jax.jit(split_sum(shapes))(x, row)
    np.testing.assert_allclose(found, x.sum(-1) + row[:, None], rtol=1e-6)
    assert shapes == [part]


@needs_devices
def test_nothing_travels_where_arrays_lie_as_they_are_split():
    devices = mesh()
    x, row = arguments(8, 4)
    x = jax.device_put(x, NamedSharding(devices, PartitionSpec("data", "tensor")))
    row = jax.device_put(row, NamedSharding(devices, PartitionSpec("data")))
    with on_mesh(devices, AXES):
        compiled = jax.jit(split_sum([])).lower(x, row).compile()
    assert not re.search(r"all-|collective|permute", compiled.as_text())
    assert compiled.output_shardings.spec == PartitionSpec("data", "tensor")


@needs_devices
def test_a_kernel_over_a_mesh_is_the_kernel():
    """The TPU kernel in Pallas' interpreter, split over 8 devices, with an operand that is a pytree."""
    from kvx.kernels.decode_attention.operands import Rows

    random = np.random.default_rng(1)
    queries, keys, values = (
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in ((4, 2, 3, 1, 16), (4, 2, 32, 16), (4, 2, 32, 16))
    )
    slots = jnp.broadcast_to(jnp.arange(32, dtype=jnp.int32), (4, 2, 32))
    positions = jnp.full((4, 1), 20, jnp.int32)

    def attend(*arrays):
        queries, keys, values, positions, slots = arrays
        keys = Rows.encode(keys, jnp.int8, slots_last=True)
        values = Rows(jnp.swapaxes(values, 2, 3), slots_last=True)
        return decode_attention(queries, keys, values, positions, slots, scale=0.25, implementation="mosaic_tpu")

    arrays = queries, keys, values, positions, slots
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        alone = jax.jit(attend)(*arrays)
        with on_mesh(mesh(), AXES):
            found = jax.jit(lambda *arrays: attend(*arrays))(*arrays)
    np.testing.assert_allclose(found.out, alone.out, atol=1e-6)
    np.testing.assert_allclose(found.lse, alone.lse, atol=1e-6)
    assert len(found.out.sharding.device_set) == 8
