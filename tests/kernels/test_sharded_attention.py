"""Attention over a mesh equals attention on one device, whatever of heads and slots is split; no cache is gathered."""

import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvx.kernels.arg_spec import CHIPS
from kvx.kernels.decode_attention import decode_attention
from kvx.kernels.decode_attention.operands import Tail
from kvx.kernels.latent_decode_attention import latent_decode_attention
from kvx.kernels.merge_partials import Partial, merge_axis, merge_partials
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes
from kvx.kernels.ragged_decode_attention import ragged_decode_attention
from kvx.kernels.sharded_attention import latent_specs, sharded_attention, slot_specs


def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("tensor", "context"))


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def positions(rows, *shape):
    """Some slots empty; the first row's all, the second's in the first quarter only."""
    random = np.random.default_rng(7)
    places = np.where(random.random((rows, *shape)) < 0.7, np.arange(shape[-1]), -1)
    places[0] = -1
    places[1, ..., shape[-1] // 4 :] = -1
    return jnp.asarray(places, jnp.int32)


def dense_operands(slots=32):
    return {
        "queries": normal(0, 3, 2, 3, 2, 16),
        "keys": normal(1, 3, 2, slots, 16),
        "values": normal(2, 3, 2, slots, 16),
        "query_positions": jnp.asarray([[40, 41]] * 3, jnp.int32),
        "key_positions": positions(3, 2, slots),
    }


def assert_same(one: Partial, many: Partial):
    # Float32 sums in another order, and a merge of four parts.
    np.testing.assert_allclose(many.out, one.out, atol=2e-6)
    np.testing.assert_allclose(many.lse, one.lse, atol=2e-6)


@pytest.mark.parametrize(("heads", "slots"), [("tensor", None), (None, "context"), ("tensor", "context")])
def test_heads_and_slots_over_a_mesh_give_one_devices_attention(heads, slots):
    arrays, attend = dense_operands(), partial(decode_attention, scale=0.25, window=30)
    many = sharded_attention(
        attend, mesh(), slot_specs(heads=heads, slots=slots), slots=slots, out=PartitionSpec(None, heads)
    )
    assert_same(attend(**arrays), jax.jit(lambda arrays: many(**arrays))(arrays))


@pytest.mark.parametrize("heads", [None, "tensor"])
def test_a_packed_cache_split_over_its_slots(heads):
    """Its tail counts once, and lengths count the slots of all devices: some have none of a row."""
    arrays, slots = dense_operands(slots=64), PartitionSpec(None, heads, None, "context")
    arrays |= {
        "keys": ChannelCodes.encode(arrays["keys"], 4, 8),
        "values": TokenCodes.encode(arrays["values"], 4, 8),
        "key_positions": jnp.where(jnp.arange(64) % 5 == 1, -1, jnp.arange(64)) + jnp.zeros((3, 2, 1), jnp.int32),
        "lengths": jnp.asarray([[64, 40], [7, 0], [33, 16]], jnp.int32),
        "tail": Tail(
            normal(3, 3, 2, 5, 16), normal(4, 3, 2, 5, 16), jnp.asarray([[[64, 65, -1, 66, 67]] * 2] * 3, jnp.int32)
        ),
    }
    arrays["query_positions"] = jnp.asarray([[66, 67]] * 3, jnp.int32)
    attend, specs = partial(decode_attention, scale=0.25, window=50), slot_specs(heads=heads, slots="context")
    # Ranges of channels have their groups of slots where numbers have their slots.
    specs["keys"] = jax.tree.unflatten(jax.tree.structure(arrays["keys"]), [slots, specs["keys"]])
    specs["values"] = slots
    many = sharded_attention(attend, mesh(), specs, slots="context", out=PartitionSpec(None, heads))
    assert_same(attend(**arrays), jax.jit(lambda arrays: many(**arrays))(arrays))


@pytest.mark.parametrize("heads", [None, "tensor"])
def test_runs_that_go_over_the_devices_slots(heads):
    """Each device reads its part of every head's run; some have none of it."""
    arrays = dense_operands()
    arrays |= {name: arrays[name][:, 0] for name in ("keys", "values", "key_positions")}
    arrays["key_positions"] = jnp.where(jnp.arange(32) % 4 == 1, -1, jnp.arange(32)) + jnp.zeros((3, 1), jnp.int32)
    arrays |= {
        "starts": jnp.asarray([[0, 5], [9, 30], [3, 16]], jnp.int32),
        "lengths": jnp.asarray([[32, 20], [0, 2], [10, 8]], jnp.int32),
    }
    rows, by_head = PartitionSpec(None, "context"), PartitionSpec(None, heads)
    specs = dict.fromkeys(("keys", "values", "key_positions"), rows)
    specs |= dict.fromkeys(("queries", "starts", "lengths"), by_head)
    attend = partial(ragged_decode_attention, scale=0.25, window=30)
    many = sharded_attention(attend, mesh(), specs, slots="context", out=by_head)
    assert_same(attend(**arrays), jax.jit(lambda arrays: many(**arrays))(arrays))


@pytest.mark.parametrize("slots_last", [False, True])
def test_latent_rows_split_over_their_slots(slots_last):
    rows = normal(1, 3, 48, 32) if slots_last else normal(1, 3, 32, 48)
    arrays = {
        "queries": normal(0, 3, 1, 4, 48),
        "rows": rows,
        "query_positions": jnp.full((3, 1), 40, jnp.int32),
        "key_positions": positions(3, 32),
        "bias": normal(5, 3, 32),
    }
    attend = partial(latent_decode_attention, value_dim=16, scale=0.2, slots_last=slots_last)
    specs = latent_specs(heads="tensor", slots="context", slots_last=slots_last)
    many = sharded_attention(attend, mesh(), specs, slots="context", out=PartitionSpec(None, None, "tensor"))
    assert_same(attend(**arrays), jax.jit(lambda arrays: many(**arrays))(arrays))


def test_each_device_holds_its_share_and_exchanges_outputs_only():
    """The compiled program has sums over devices, of outputs and log-sum-exps, and nothing that gathers."""
    arrays, devices = dense_operands(slots=4096), mesh()
    specs = slot_specs(slots="context")
    placed = {name: jax.device_put(array, NamedSharding(devices, specs[name])) for name, array in arrays.items()}
    many = sharded_attention(partial(decode_attention, scale=0.25), devices, specs, slots="context")
    text = jax.jit(lambda arrays: many(**arrays)).lower(placed).compile().as_text()
    assert_exchanges_no_cache(text, exchanged=arrays["queries"].size // 16 * 17)


def assert_exchanges_no_cache(text: str, exchanged: int):
    """No gathers; sums and maxima of at most `exchanged` numbers in all but the maxima."""
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    summed = [
        max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in re.findall(r"\[([\d,]*)\]", line))
        for line in re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    ]
    assert 1 <= len(summed) <= 2, "a maximum and a sum"
    assert max(summed) <= exchanged


def test_positions_are_needed_and_sizes_must_divide():
    arrays = dense_operands()
    attend = partial(decode_attention, scale=0.25)
    split = sharded_attention(attend, mesh(), slot_specs(slots="context"), slots="context")
    with pytest.raises(ValueError, match="key_positions is None, allowed with slots split over 'context'"):
        split(**arrays | {"key_positions": None})
    with pytest.raises(ValueError, match=r"keys lies as .*\(\), allowed with slots split over 'context'"):
        sharded_attention(attend, mesh(), {}, slots="context")(**arrays)
    with pytest.raises(
        ValueError, match="keys has 30 along axis 2, allowed: multiples of the 4 devices along 'context'"
    ):
        split(**dense_operands(slots=30))


def test_merging_along_an_axis_is_merging_the_parts():
    parts = [Partial(normal(seed, 2, 3, 4), normal(seed + 10, 2, 3)) for seed in range(3)]
    parts.append(Partial(jnp.zeros((2, 3, 4)), jnp.full((2, 3), -jnp.inf)))
    stacked = merge_axis(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))
    assert_same(merge_partials(*parts), stacked)
    empty = merge_axis(jax.tree.map(lambda leaf: leaf[None], parts[-1]))
    assert not empty.out.any() and (empty.lse == -jnp.inf).all()


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_compiled_for_four_tpus_no_latent_cache_is_gathered(implementation):
    """32768 slots of DeepSeek's latents over the four chips of v5e:2x2."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(CHIPS["v5e"], platform="tpu").devices
    chips, specs = Mesh(np.array(devices), ("context",)), latent_specs(slots="context", slots_last=True)
    shapes = {
        "queries": ((8, 1, 128, 576), jnp.bfloat16),
        "rows": ((8, 576, 32768), jnp.bfloat16),
        "query_positions": ((8, 1), jnp.int32),
        "key_positions": ((8, 32768), jnp.int32),
    }
    arrays = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(chips, specs[name]))
        for name, (shape, dtype) in shapes.items()
    }
    attend = partial(latent_decode_attention, value_dim=512, scale=0.1, slots_last=True, implementation=implementation)
    many = sharded_attention(attend, chips, specs, slots="context")
    compiled = jax.jit(lambda arrays: many(**arrays)).lower(arrays).compile()
    assert_exchanges_no_cache(compiled.as_text(), exchanged=8 * 128 * 640)
    if implementation == "mosaic_tpu":
        # A chip's share of the cache is 72 MiB: nothing near it is made beside it.
        assert compiled.memory_analysis().temp_size_in_bytes < 2**23
