"""Partials: attention over a union of disjoint sets equals the merge over the sets, empty ones included."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.kernels.decode_attention import decode_attention, decode_probabilities
from kvx.kernels.merge_partials import Partial, merge_partials

attend = jax.jit(decode_attention, static_argnames="scale")
probabilities = jax.jit(decode_probabilities, static_argnames="scale")


def operands(slots: int, seed: int):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    places = jnp.asarray(np.where(random.random((2, 2, slots)) < 0.7, np.arange(slots), -1), jnp.int32)
    return normal(2, 2, 3, 1, 8), normal(2, 2, slots, 8), normal(2, 2, slots, 8), jnp.full((2, 1), slots), places


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 30), st.lists(st.integers(0, 30), max_size=3), st.integers(0, 1000))
def test_parts_merge_to_the_whole(slots, cuts, seed):
    query, keys, values, spot, places = operands(slots, seed)
    whole = attend(query, keys, values, spot, places, scale=0.5)
    edges = [0, *sorted(min(cut, slots) for cut in cuts), slots]
    parts = [
        attend(query, keys[:, :, a:b], values[:, :, a:b], spot, places[..., a:b], scale=0.5)
        for a, b in pairwise(edges)
        if b > a
    ]
    merged = merge_partials(*parts)
    np.testing.assert_allclose(np.asarray(merged.out), np.asarray(whole.out), atol=2e-6)
    np.testing.assert_allclose(np.asarray(merged.lse), np.asarray(whole.lse), atol=2e-6)
    chances = probabilities(query, keys, spot, places, whole.lse, scale=0.5)
    some = np.asarray(jnp.any(places >= 0, axis=-1), np.float32)
    np.testing.assert_allclose(
        np.asarray(chances.sum(-1))[..., 0], np.broadcast_to(some[..., None], (2, 2, 3)), atol=1e-5
    )


def test_the_empty_part_is_neutral_and_nothing_merges_to_nothing():
    nothing = Partial(jnp.zeros((2, 4)), jnp.full(2, -jnp.inf))
    something = Partial(jnp.ones((2, 4)), jnp.asarray([3.0, -200.0]))
    merged = merge_partials(nothing, something, nothing)
    assert np.array_equal(merged.out, something.out) and np.array_equal(merged.lse, something.lse)
    empty = merge_partials(nothing, nothing)
    assert not np.asarray(empty.out).any() and (np.asarray(empty.lse) == -np.inf).all()


def test_merging_survives_logits_far_beyond_float32s_exponent():
    low, high = Partial(jnp.zeros(3), jnp.asarray(-1e4)), Partial(jnp.ones(3), jnp.asarray(1e4))
    merged = merge_partials(low, high)
    assert np.array_equal(merged.out, np.ones(3)) and float(merged.lse) == 1e4
