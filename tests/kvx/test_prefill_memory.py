"""Claims about memory in prefill: no S x S array, and one layer's full keys and values at a time beside the cache."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import kvx
from kvx.evidence import Requests
from kvx.kernels.prefill_attention import prefill_attention
from kvx.kernels.prefill_attention.columns import SUM
from kvx.loop import attend_turned, turn_to
from kvx.policy_text import parse_policy
from tests import tiny

LENGTHS = (512, 2048, 8192)
ROWS, KV_HEADS, HEAD_DIM = 3, 2, 32


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def attend_temporaries(length, requests):
    """Bytes of temporaries of one layer over a prompt."""
    block = tiny.model().blocks[0]
    x = jax.ShapeDtypeStruct((1, length, tiny.CONFIG["hidden_size"]), jnp.float32)
    positions = jnp.arange(length)[None]
    turn = turn_to(block.rotary, positions)
    layer = jax.jit(lambda x: attend_turned(block, x, positions, turn, requests=requests))
    return temporaries(layer.lower(x).compile())


def kernel_temporaries(length, implementation, columns):
    """Bytes of temporaries of the attention operation alone."""

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    operation = partial(prefill_attention, scale=1.0, columns=columns, implementation=implementation)
    keys = shape(1, KV_HEADS, length, HEAD_DIM)
    lowered = jax.jit(operation).lower(
        shape(1, KV_HEADS, 1, length, HEAD_DIM), keys, keys, shape(1, length, dtype=jnp.int32),
        shape(1, KV_HEADS, length, dtype=jnp.int32),
    )  # fmt: skip
    return temporaries(lowered.compile())


def growth_per_token(sizes):
    """How much more a token costs in the longest prompt than in the shortest: 1 if linear, 16 if quadratic."""
    return (sizes[-1] / LENGTHS[-1]) / (sizes[0] / LENGTHS[0])


@pytest.mark.parametrize("columns", [(), (SUM,)])
def test_temporaries_of_a_layer_grow_linearly_with_the_prompt(columns):
    sizes = [attend_temporaries(length, Requests(columns=frozenset(columns))) for length in LENGTHS]
    print("attend", columns, sizes)
    assert growth_per_token(sizes) < 1.5


@pytest.mark.parametrize("columns", [(), (SUM,)])
def test_the_reference_grows_quadratically_so_that_the_measure_can_tell(columns):
    sizes = [kernel_temporaries(length, "reference", columns) for length in LENGTHS]
    print("reference", columns, sizes)
    assert growth_per_token(sizes) == pytest.approx(16, rel=0.02)


@pytest.mark.parametrize("length", [512, 1024])
def test_short_prompts_too_hold_one_block_of_logits_at_a_time(length):
    # One loop turn a group would be unrolled, and all blocks' logits, half of the square, be alive together.
    assert kernel_temporaries(length, "xla", ()) < kernel_temporaries(length, "reference", ()) / 2.5


def live_kv_bytes() -> int:
    """Bytes of every live array that is shaped like keys or values of the batch."""
    arrays = (array for array in jax.live_arrays() if array.ndim == 4)
    return sum(a.nbytes for a in arrays if a.shape[:2] == (ROWS, KV_HEADS) and a.shape[3] == HEAD_DIM)


def sampled_prefill(monkeypatch, text, layers, length):
    """Peak of live KV bytes over a prefill, before and after each layer's attention and packing; and the cache."""
    modules = {"attend": "kvx.prefill", "pack_layer": "kvx.cache_builder"}
    before, samples = live_kv_bytes(), []

    def sampling(function):
        def call(*positional, **named):
            samples.append(live_kv_bytes())
            result = function(*positional, **named)
            samples.append(live_kv_bytes())
            return result

        return call

    for name, where in modules.items():
        module = importlib.import_module(where)
        monkeypatch.setattr(module, name, sampling(getattr(module, name)))
    tokens, _ = tiny.prompts(*[length] * ROWS)
    _, cache = kvx.prefill(tiny.model(num_hidden_layers=layers), tokens, parse_policy(text))
    assert len(samples) == 4 * layers
    return max(samples) - before, live_kv_bytes() - before, cache


def full_layer(length):
    return 2 * ROWS * KV_HEADS * length * HEAD_DIM * 4


@pytest.mark.parametrize("layers", [4, 8])
def test_a_prefill_holds_one_layers_keys_and_values_beside_the_compressed_rest(monkeypatch, layers):
    length = 768
    peak, after, cache = sampled_prefill(monkeypatch, "snapkv(budget=32, window=8)", layers, length)
    print(layers, "layers: peak", peak, "cache", cache.nbytes, "full layer", full_layer(length))
    assert after == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) <= cache.nbytes
    assert peak == full_layer(length) + after


def test_a_policy_that_decides_at_the_end_holds_every_layer_so_that_the_measure_can_tell(monkeypatch):
    length = 256
    peak, _, _ = sampled_prefill(monkeypatch, "d2o(budget=16, skip=(0,))", 4, length)
    assert peak >= 4 * full_layer(length)
