"""Quantizing and packing in one pass: the words that two passes give, and rows within half a step of the first ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.kernels.quantize_pack import BITS, dequantize, pack, quantize, quantize_pack, unpack_dequantize
from kvx.kernels.quantize_pack.arg_specs import NUMERIC
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes

ON_GPU = jax.default_backend() == "gpu"
FAST = NUMERIC[::3]


def name(spec):
    return f"{spec.function} {spec}"


@settings(deadline=None, max_examples=6)
@given(
    st.sampled_from(BITS),
    st.sampled_from(["channels", "slots"]),
    st.sampled_from(["reference", "xla"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_there_and_back_is_off_by_half_a_step_at_most(bits, along, implementation, slots_last, seed):
    shape = (1, 2, 64, 32) if slots_last else (1, 2, 32, 64)
    rows = jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
    codes = quantize_pack(rows, bits=bits, group=16, along=along, slots_last=slots_last, implementation=implementation)
    assert isinstance(codes, ChannelCodes if along == "slots" else TokenCodes)
    back = unpack_dequantize(codes, slots_last=slots_last, implementation=implementation)
    step = jnp.repeat(codes.scale, 16, axis=2)
    step = step if (along == "channels") == slots_last else jnp.swapaxes(step, 2, 3)
    # Float32 rounding of c s + m on top of the bound.
    assert (np.abs(back - rows) <= step / 2 + 2e-6).all()


def test_words_are_those_of_quantize_and_then_pack():
    rows = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, 8, 64)), jnp.float32)
    codes, scale, minimum = quantize(rows.reshape(1, 1, 8, 2, 32), 4)
    fused = quantize_pack(rows, bits=4, group=32, along="channels", implementation="reference")
    np.testing.assert_array_equal(jnp.swapaxes(fused.words, 2, 3), pack(codes.reshape(rows.shape), 4))
    np.testing.assert_array_equal(
        unpack_dequantize(fused, implementation="reference"), dequantize(codes, scale, minimum).reshape(rows.shape)
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 5}, r"bits is 5, allowed: \(2, 3, 4, 8\)"),
        ({"group": 24}, "group is 24, allowed: divisors of the 64 channels"),
        ({"group": 24, "along": "slots"}, "group is 24, allowed: divisors of the 16 slots"),
        ({"along": "heads"}, "along is 'heads', allowed: 'channels', 'slots'"),
        ({"group": 4, "implementation": "mosaic_tpu"}, "group is 4, it takes multiples of 8"),
        ({"implementation": "mosaic_gpu"}, "implementation is 'mosaic_gpu', quantize_pack has"),
    ],
)
def test_what_cannot_run_is_refused_with_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        quantize_pack(jnp.zeros((1, 1, 16, 64)), **{"bits": 4, "group": 32, "along": "channels"} | options)


def test_a_dtype_that_kernels_do_not_take_is_refused():
    rows = jnp.zeros((1, 1, 128, 64), jnp.float16)
    with pytest.raises(ValueError, match="rows has dtype float16, it takes bfloat16 and float32"):
        quantize_pack(rows, bits=8, group=32, along="channels", implementation="mosaic_tpu")
    codes = TokenCodes.encode(jnp.zeros((1, 1, 128, 64)), 8, group=32)
    with pytest.raises(ValueError, match="what is decoded has dtype float16"):
        unpack_dequantize(codes, dtype=jnp.float16, implementation="mosaic_tpu")


def test_words_that_fill_no_tile_of_a_tpu_are_refused():
    with pytest.raises(ValueError, match="a slot has 12 words, it takes up to 8 or multiples of 8"):
        quantize_pack(jnp.zeros((1, 1, 16, 128)), bits=3, group=32, along="channels", implementation="mosaic_tpu")


def test_channels_that_fill_no_words_and_nested_codes_are_refused():
    with pytest.raises(ValueError, match="rows have 20 channels, allowed at 3 bits"):
        quantize_pack(jnp.zeros((1, 1, 4, 20)), bits=3, group=4, along="channels")
    nested = TokenCodes.encode(jnp.zeros((1, 1, 4, 32)), 4, group=32, nested=True)
    with pytest.raises(ValueError, match="codes have lower codes, allowed: None"):
        unpack_dequantize(nested)
