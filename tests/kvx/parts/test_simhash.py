"""Claims about SimHash: the law of angles, its invariances, and packing against a sum of booleans."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvx.parts.simhash import hamming, hyperplanes, simhash


def planes(bits, dim=16, seed=0, layer=0):
    return hyperplanes(seed, jnp.int32(layer), bits, dim)


def vectors(count, dim=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


@pytest.mark.parametrize("angle", [0.2, 1.0, np.pi / 2, 2.5])
def test_the_share_of_bits_that_differ_is_the_angle_over_pi(angle):
    bits, trials = 64, 100
    first, other = vectors(2)
    first /= np.linalg.norm(first)
    other -= first * (first @ other)
    other /= np.linalg.norm(other)
    second = np.cos(angle) * first + np.sin(angle) * other
    counts = []
    for seed in range(trials):
        sides = planes(bits, seed=seed)
        counts.append(int(hamming(simhash(jnp.asarray(first), sides), simhash(jnp.asarray(second), sides))))
    share = angle / np.pi
    assert abs(np.mean(counts) / bits - share) < 3 * np.sqrt(share * (1 - share) / (bits * trials))


@pytest.mark.parametrize("bits", [1, 16, 31, 32, 33, 100])
def test_words_hold_the_bits(bits):
    some = vectors(20)
    codes = np.asarray(simhash(jnp.asarray(some), planes(bits)))
    assert codes.shape == (20, -(-bits // 32)) and codes.dtype == np.uint32
    sides = some.astype(np.float64) @ np.asarray(planes(bits), np.float64).T > 0
    unpacked = (codes[:, np.arange(bits) // 32] >> (np.arange(bits) % 32)) & 1
    np.testing.assert_array_equal(unpacked, sides)
    found = np.asarray(hamming(jnp.asarray(codes)[:, None], jnp.asarray(codes)[None]))
    np.testing.assert_array_equal(found, np.sum(sides[:, None] != sides[None], axis=-1))


def test_itself_its_opposite_its_multiples_and_nothing():
    some, sides = jnp.asarray(vectors(20)), planes(40)
    codes = simhash(some, sides)
    np.testing.assert_array_equal(hamming(codes, codes), 0)
    np.testing.assert_array_equal(hamming(codes, simhash(-some, sides)), 40)
    np.testing.assert_array_equal(codes, simhash(some * 8.0, sides))
    np.testing.assert_array_equal(simhash(jnp.zeros((3, 16)), sides), np.zeros((3, 2)))


def test_layers_and_seeds_have_their_own_planes_and_keep_them():
    np.testing.assert_array_equal(planes(8), planes(8))
    assert not np.allclose(planes(8), planes(8, layer=1))
    assert not np.allclose(planes(8), planes(8, seed=1))
