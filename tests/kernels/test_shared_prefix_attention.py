"""Shared-prefix attention equals attention with the prefix copied into every row (Hydragen's check)."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from kvx.kernels.arg_spec import CHIPS
from kvx.kernels.decode_attention import decode_attention
from kvx.kernels.implementations import compiling_for
from kvx.kernels.shared_prefix_attention import prefix_attention, shared_prefix_attention
from tests.kernels.interpreting import interpreted_without_races


def operands(batch, group, length, prefix, slots, seed, widths=(8, 6)):
    width, value_width = widths
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    own = np.where(random.random((batch, 2, slots)) < 0.7, prefix + np.arange(slots), -1)
    last = prefix + random.integers(0, slots + 1, (batch, 1))
    spots = np.where(random.random((batch, 1)) < 0.8, last + np.arange(length), -1)
    return {
        "queries": normal(batch, 2, group, length, width),
        "prefix_keys": normal(2, prefix, width),
        "prefix_values": normal(2, prefix, value_width),
        "keys": normal(batch, 2, slots, width),
        "values": normal(batch, 2, slots, value_width),
        "query_positions": jnp.asarray(spots, jnp.int32),
        "prefix_positions": jnp.asarray(np.where(random.random((2, prefix)) < 0.9, np.arange(prefix), -1), jnp.int32),
        "key_positions": jnp.asarray(own, jnp.int32),
    }


def copied(arrays, **options):
    """The prefix in every row's own cache."""
    batch = arrays["queries"].shape[0]

    def joined(name, prefix):
        whole = jnp.broadcast_to(arrays[prefix], (batch, *arrays[prefix].shape))
        return jnp.concatenate([whole, arrays[name]], axis=2)

    return decode_attention(
        arrays["queries"],
        joined("keys", "prefix_keys"),
        joined("values", "prefix_values"),
        arrays["query_positions"],
        joined("key_positions", "prefix_positions"),
        **options,
    )


@pytest.mark.parametrize(
    ("batch", "group", "length", "prefix", "window"),
    [
        (4, 3, 2, 20, None),
        (3, 1, 1, 20, 18),
        pytest.param(3, 3, 2, 20, 4, marks=pytest.mark.slow),
        pytest.param(1, 1, 1, 1, None, marks=pytest.mark.slow),
        pytest.param(2, 3, 1, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_reading_the_prefix_once_is_reading_it_in_every_row(batch, group, length, prefix, window):
    """Whatever the window leaves of it, which differs from row to row; rows that have ended see nothing."""
    arrays = operands(batch, group, length, prefix, 9, seed=batch)
    options = {"scale": 0.3, "window": window, "softcap": 8.0}
    wanted = jax.jit(lambda arrays: copied(arrays, **options))(arrays)
    found = jax.jit(lambda arrays: shared_prefix_attention(**arrays, **options))(arrays)
    # Float32 sums of 29 terms in another order.
    np.testing.assert_allclose(found.out, wanted.out, atol=2e-6)
    np.testing.assert_allclose(found.lse, wanted.lse, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 18])
def test_a_tpus_kernel_reads_the_prefix_once_too(window):
    """The queries of all rows as query heads of one; or, in a window, as so many queries at their own positions."""
    arrays, options = operands(3, 2, 2, 200, 140, 5, widths=(128, 128)), {"scale": 0.1, "window": window}
    wanted = jax.jit(lambda arrays: copied(arrays, **options))(arrays)
    with interpreted_without_races():
        found = jax.jit(lambda arrays: shared_prefix_attention(**arrays, **options, implementation="mosaic_tpu"))(
            arrays
        )
        jax.block_until_ready(found)
    # Float32 sums of up to 340 terms in another order.
    np.testing.assert_allclose(found.out, wanted.out, atol=1e-5)
    np.testing.assert_allclose(found.lse, wanted.lse, atol=1e-5)


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize("window", [None, 4096])
def test_a_tpus_kernel_takes_large_batches(window):
    """256 rows of Llama-3-8B are 1024 query rows a KV head, whose sums do not fit a v5e's VMEM together."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    chip = SingleDeviceSharding(topologies.get_topology_desc(CHIPS["v5e"], platform="tpu").devices[0])
    shapes = {
        "queries": ((256, 8, 4, 1, 128), jnp.bfloat16),
        "keys": ((8, 8192, 128), jnp.bfloat16),
        "values": ((8, 8192, 128), jnp.bfloat16),
        "query_positions": ((256, 1), jnp.int32),
        "key_positions": ((8, 8192), jnp.int32),
    }
    arrays = {name: jax.ShapeDtypeStruct(*shape, sharding=chip) for name, shape in shapes.items()}
    with compiling_for("tpu"):
        lowered = jax.jit(lambda arrays: prefix_attention(**arrays, scale=0.1, window=window)).lower(arrays)
    text = lowered.compile().as_text()
    assert "tpu_custom_call" in text and "1024,8192]" not in text, "its logits do not leave the chip"


def test_an_empty_prefix_leaves_the_suffix_as_it_is():
    arrays = operands(2, 3, 1, 4, 9, 0)
    arrays["prefix_positions"] = jnp.full_like(arrays["prefix_positions"], -1)
    found = jax.jit(lambda arrays: shared_prefix_attention(**arrays, scale=0.3))(arrays)
    own = [arrays[name] for name in ("queries", "keys", "values", "query_positions", "key_positions")]
    wanted = jax.jit(lambda own: decode_attention(*own, scale=0.3))(own)
    # A weight of exactly one and a sum with exact zeros, but two programs may round a matmul differently.
    np.testing.assert_allclose(found.out, wanted.out, atol=1e-6)
    np.testing.assert_allclose(found.lse, wanted.lse, atol=1e-6)


@pytest.mark.parametrize("window", [None, 12])
def test_the_prefix_is_read_as_one_matrix_product_for_the_whole_batch(window):
    """No array of the batch times the prefix's keys: the only products are those of rows with one copy of it."""
    arrays = operands(4, 3, 1, 1024, 9, 1)
    names = ("queries", "prefix_keys", "prefix_values", "query_positions", "prefix_positions")
    jaxpr = jax.make_jaxpr(lambda *args: prefix_attention(*args, scale=0.3, window=window))(
        *(arrays[name] for name in names)
    )
    widest = max(
        (var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars if var.aval.shape[-2:] in ((1024, 8), (1024, 6))),
        default=0,
    )
    assert widest <= 2 * 1024 * 8
