"""Claims about chance: a token's number depends on seed, layer, head and true position, and on nothing else."""

import jax.numpy as jnp
import numpy as np

from kvx.parts.chance import uniforms


def drawn(positions, seed=0, layer=0):
    return np.asarray(uniforms(seed, jnp.int32(layer), jnp.asarray(positions, jnp.int32)))


def test_place_in_batch_and_slot_do_not_matter():
    positions = np.array([[[5, 9, 2], [5, 9, 2]], [[2, 5, 7], [9, 1, 5]]])
    found = drawn(positions)
    lookup = {}
    for row, head, slot in np.ndindex(positions.shape):
        value = found[row, head, slot]
        assert lookup.setdefault((head, positions[row, head, slot]), value) == value
    assert len(set(lookup.values())) == len(lookup)
    np.testing.assert_array_equal(drawn(positions[1:]), found[1:])


def test_seed_layer_head_and_position_each_draw_anew():
    positions = np.broadcast_to(np.arange(50), (1, 2, 50))
    several = [drawn(positions), drawn(positions, seed=1), drawn(positions, layer=1)]
    together = np.concatenate([each.reshape(-1) for each in several])
    # 300 of 2^23 values: two fall together with a chance of a half per cent; under this seed none do.
    assert len(np.unique(together)) == 300


def test_they_are_uniform():
    found = drawn(np.broadcast_to(np.arange(10_000), (1, 2, 10_000)))
    assert found.min() >= 0 and found.max() < 1
    # Four standard errors of a count of n p.
    counts = np.histogram(found, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 2000).max() < 4 * np.sqrt(20_000 * 0.1 * 0.9)
    # Neighbours in the text and across heads are uncorrelated: 1 / sqrt(n) is the standard error.
    pairs = [(found[0, 0, 1:], found[0, 0, :-1]), (found[0, 0], found[0, 1])]
    assert all(abs(np.corrcoef(*pair)[0, 1]) < 4 / np.sqrt(10_000) for pair in pairs)
