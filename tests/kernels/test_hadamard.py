"""The Walsh-Hadamard transform: its own inverse, an isometry, scipy's matrix; every implementation is the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.kernels.hadamard import hadamard

ON_GPU = jax.default_backend() == "gpu"


@settings(deadline=None, max_examples=6)
@given(st.sampled_from([1, 2, 64, 128, 256]), st.integers(0, 99))
def test_twice_is_once_lengths_stay_and_logits_do_too(channels, seed):
    first, second = np.random.default_rng(seed).standard_normal((2, 3, channels)).astype(np.float32)
    turned = [np.asarray(hadamard(jnp.asarray(x))) for x in (first, second)]
    # Sums of 256 numbers of size one, in float32.
    np.testing.assert_allclose(hadamard(jnp.asarray(turned[0])), first, atol=3e-6)
    np.testing.assert_allclose(np.linalg.norm(turned[0], axis=-1), np.linalg.norm(first, axis=-1), rtol=1e-5)
    np.testing.assert_allclose((turned[0] * turned[1]).sum(-1), (first * second).sum(-1), atol=1e-4)


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_it_is_the_matrix_of_its_name_over_either_axis(channels):
    x = np.random.default_rng(0).standard_normal((2, channels, 5)).astype(np.float32)
    wanted = np.einsum("ij,bjm->bim", scipy.linalg.hadamard(channels) * channels**-0.5, x)
    for implementation in ("reference", "xla"):
        slots_last = hadamard(jnp.asarray(x), axis=-2, implementation=implementation)
        channels_last = hadamard(jnp.asarray(np.swapaxes(x, 1, 2)), implementation=implementation)
        np.testing.assert_allclose(slots_last, wanted, atol=1e-5)
        np.testing.assert_allclose(np.swapaxes(channels_last, 1, 2), wanted, atol=1e-5)


def test_an_outlier_channel_is_spread_over_all():
    """QuaRot's reason: a lone a becomes a / sqrt(D) everywhere."""
    x = jnp.zeros((1, 64)).at[0, 17].set(8.0)
    np.testing.assert_allclose(np.abs(hadamard(x)), np.ones((1, 64)), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    [
        ((2, 96), {}, "x has 96 channels, allowed: powers of two"),
        ((2, 64, 4), {"axis": 0}, "axis is 0, allowed: -1 or -2"),
        ((2, 8), {"implementation": "mosaic_tpu"}, "x has 8 channels, it takes 16 to 256"),
        ((2, 512), {"implementation": "triton"}, "x has 512 channels, it takes 16 to 256"),
        ((2, 64), {"implementation": "cuda"}, "implementation is 'cuda', hadamard has reference, xla"),
    ],
)
def test_what_cannot_run_is_refused_with_a_sentence(shape, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        hadamard(jnp.zeros(shape), **options)


def test_a_dtype_that_kernels_do_not_take_is_refused():
    with pytest.raises(ValueError, match="x has dtype float16, it takes bfloat16 and float32"):
        hadamard(jnp.zeros((2, 64), jnp.float16), implementation="mosaic_tpu")
