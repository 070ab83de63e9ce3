"""Codes: the half-step error bound, exact round trips, and one bit order."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvx.kernels.quantize_pack import BITS, dequantize, pack, quantize, unpack, words

rows = hnp.arrays(np.float32, (3, 32), elements=st.floats(-1e4, 1e4, width=32))


@settings(deadline=None, max_examples=60)
@given(rows, st.sampled_from(BITS))
def test_no_element_is_off_by_more_than_half_a_step(x, bits):
    codes, scale, minimum = quantize(jnp.asarray(x), bits)
    error = np.abs(np.asarray(dequantize(codes, scale, minimum)) - x)
    step = np.asarray(scale, np.float32)[:, None]
    # Float32 rounding of c * s + m on top of the bound.
    assert (error <= step / 2 + 1e-6 * np.abs(x) + 1e-30).all()


@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_and_zeros_are_exact_to_the_scales_dtype(bits):
    x = jnp.asarray([[0.0] * 32, [3.0] * 32, [-1.5] * 32])
    back = np.asarray(dequantize(*quantize(x, bits)))
    assert not back[0].any()
    np.testing.assert_allclose(back, np.asarray(x), rtol=2**-8)


def test_each_bit_halves_the_error():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((500, 64)), jnp.float32)
    rms = [float(jnp.sqrt(jnp.mean((dequantize(*quantize(x, bits)) - x) ** 2))) for bits in (2, 3, 4)]
    assert 1.9 < rms[0] / rms[1] < 2.6 and 1.9 < rms[1] / rms[2] < 2.3


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.uint8, (2, 64), elements=st.integers(0, 255)), st.sampled_from(BITS))
def test_packing_is_a_little_end_bit_string(codes, bits):
    codes = codes & (2**bits - 1)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.shape == (2, words(64, bits)) and packed.dtype == jnp.uint32
    stored = np.unpackbits(np.asarray(packed).view(np.uint8), axis=-1, bitorder="little")
    expected = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits].reshape(2, -1)
    assert np.array_equal(stored, expected)
    assert np.array_equal(unpack(packed, bits), codes)
