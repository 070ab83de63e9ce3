"""Claims about rotation: it composes, it can be undone, and neither doubles YaRN's magnitude."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvx.rotary import Rotary

X = np.random.default_rng(0).standard_normal((1, 2, 5, 24)).astype(np.float32)
POSITIONS = np.asarray([[[0, 3, 17, 250, 1000]]], np.int32)


@pytest.mark.parametrize("magnitude", [1.0, 1.4])
@pytest.mark.parametrize("pairs", [12, 8])
def test_rotations_compose_and_are_undone(magnitude, pairs):
    """With 8 pairs of 24 channels the rest passes unchanged."""
    rotary = Rotary(jnp.asarray(1e4 ** -(np.arange(pairs) / pairs), jnp.float32), jnp.float32(magnitude))
    turned = rotary(jnp.asarray(X), jnp.asarray(POSITIONS))
    # Angles up to 1300 radians in float32.
    np.testing.assert_allclose(rotary.back(turned, jnp.asarray(POSITIONS)), X, atol=1e-3)
    for distance in (-2, 0, 5, 300):
        moved = rotary.onwards(turned, jnp.full_like(POSITIONS, distance))
        np.testing.assert_allclose(moved, rotary(jnp.asarray(X), jnp.asarray(POSITIONS + distance)), atol=1e-3)
    np.testing.assert_array_equal(rotary.onwards(turned, jnp.zeros_like(POSITIONS)), turned)
