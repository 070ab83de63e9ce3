"""Claims about the L2-norm rule (Devoto et al. 2024): small keys stay, whatever their position or rotation."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from kvx import policies
from tests.kvx.policies.direct import context, evidence, kept, tokens

LENGTH = 30


def choose(some, budget=9):
    return kept(policies.knorm(budget), some, evidence(LENGTH), context(LENGTH))


def test_kept_sets_are_the_smallest_norms():
    some = tokens(3, LENGTH)
    norms = np.linalg.norm(np.asarray(some.keys)[0], axis=-1)
    wanted = np.argsort(np.argsort(norms, axis=1, kind="stable"), axis=1) < 9
    np.testing.assert_array_equal(choose(some), wanted)


def test_rotation_does_not_change_the_choice():
    rotated = tokens(2, LENGTH)
    np.testing.assert_array_equal(choose(rotated), choose(rotated.with_form(rotated=False)))


def test_a_shrunken_key_stays_and_a_stretched_one_goes():
    some = tokens(2, LENGTH)
    shrunken = replace(some, keys=some.keys.at[:, :, 7].multiply(0.01))
    stretched = replace(some, keys=some.keys.at[:, :, 7].multiply(100))
    assert choose(shrunken, 1)[:, 7].all()
    assert not choose(stretched, LENGTH - 1)[:, 7].any()
    assert choose(stretched, LENGTH - 1).sum() == 2 * (LENGTH - 1)


def test_permuted_keys_permute_the_choice():
    some = tokens(2, LENGTH)
    order = np.random.default_rng(3).permutation(LENGTH)
    permuted = replace(some, keys=jnp.asarray(np.asarray(some.keys)[:, :, order]))
    np.testing.assert_array_equal(choose(permuted), choose(some)[:, order])


def test_norms_of_half_precision_keys_are_taken_in_float32():
    # Squares of 300 overflow float16; all norms would tie at infinity.
    some = tokens(1, LENGTH)
    scaled = 300 + np.arange(LENGTH)[::-1, None] * np.ones(8)
    half = replace(some, keys=jnp.asarray(scaled[None, None], jnp.float16), values=some.values.astype(jnp.float16))
    np.testing.assert_array_equal(np.flatnonzero(choose(half)), np.arange(LENGTH - 9, LENGTH))


def test_skipped_layers_are_left_alone():
    policy = policies.knorm(8, skip=(0, -1))
    assert [len(policy.at(layer, 4).stages) for layer in range(4)] == [0, 1, 1, 0]
