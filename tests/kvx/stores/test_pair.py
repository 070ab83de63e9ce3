"""Claims about directions that two layers share: what spherical interpolation keeps, which pairs stay apart, bytes."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvx.stores.base import nbytes
from kvx.stores.directions import Blend, Directions, merged
from kvx.stores.pair import LOWER, UPPER, Half, Pair
from kvx.tokens import Tokens
from tests.kvx.stores import one_layer

MERGE = Blend(0.6, 0.0, 0.1, "distinct")
"""Nothing stays apart but opposite vectors."""


def vectors(count=40, width=32, seed=0):
    """The lower and the upper layer's, (1, 2, count, width)."""
    random = np.random.default_rng(seed)
    lower, other = random.normal(size=(2, 1, 2, count, width))
    # Angles of all sizes between the two, as neighbouring layers have.
    upper = lower + other * np.linspace(0, 3, count)[:, None]
    return tuple(jnp.asarray(rows * random.uniform(0.5, 9, (1, 2, count, 1)), jnp.float32) for rows in (lower, upper))


def angle(first, second):
    first, second = (np.asarray(rows, np.float64) for rows in (first, second))
    cosine = np.sum(first * second, axis=-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
    return np.arccos(np.clip(cosine, -1, 1))


def packed(lower, upper, blend):
    return Directions.pack(lower, upper, jnp.ones(lower.shape[:3], bool), blend)


def at_angles(*degrees):
    """Lower and upper unit vectors at these angles, one head, and lengths 2 and 3."""
    radians = np.radians(degrees)
    lower = np.tile([2.0, 0.0], (len(radians), 1))
    upper = 3 * np.stack([np.cos(radians), np.sin(radians)], axis=-1)
    return tuple(jnp.asarray(rows[None, None], jnp.float32) for rows in (lower, upper))


def kept_apart(directions, capacity):
    slots = np.asarray(directions.slots)
    return [sorted(head[head < capacity].tolist()) for row in slots for head in row]


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.6, 1.0])
def test_both_vectors_keep_their_length_and_turn_by_their_share_of_the_angle(t):
    lower, upper = vectors()
    shared = packed(lower, upper, Blend(t, 0.0, 0.1, "distinct"))
    between = angle(lower, upper)
    for layer, exact, share in ((LOWER, lower, 1 - t), (UPPER, upper, t)):
        restored = shared.restored(layer)
        # float32: a length to one part in 1e6, an angle by arccos to the root of it near 0.
        np.testing.assert_allclose(np.linalg.norm(restored, axis=-1), np.linalg.norm(exact, axis=-1), rtol=1e-6)
        np.testing.assert_allclose(angle(exact, restored), share * between, atol=1e-3)
    if t in (0.0, 1.0):
        np.testing.assert_allclose(shared.restored(LOWER if t else UPPER), lower if t else upper, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.2, 30.0])
def test_parallel_vectors_are_restored_exactly(factor):
    lower, _ = vectors()
    shared = packed(lower, factor * lower, MERGE)
    np.testing.assert_allclose(shared.restored(LOWER), lower, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shared.restored(UPPER), factor * lower, rtol=1e-5, atol=1e-5)


def test_the_interpolation_is_continuous_where_its_formula_has_no_digits():
    for degrees in (0.0, 1e-4, 0.005, 0.02, 179.98, 180.0):
        unit, _, found = merged(*(rows[0, 0, 0] for rows in at_angles(degrees)), 0.6)
        assert np.isclose(np.linalg.norm(unit), 1, rtol=1e-5) and np.isclose(found, np.radians(degrees), atol=1e-6)
        if degrees < 90:
            np.testing.assert_allclose(angle([1.0, 0.0], unit), 0.4 * np.radians(degrees), atol=4e-4)


def test_a_vector_of_length_zero_takes_no_part():
    lower, upper = at_angles(30)
    shared = packed(0 * lower, upper, MERGE)
    np.testing.assert_allclose(shared.restored(UPPER), upper, rtol=1e-6)
    assert not np.asarray(shared.restored(LOWER)).any()
    assert not np.asarray(packed(0 * lower, 0 * upper, MERGE).restored(UPPER)).any()


def test_merging_before_and_after_a_common_rotation_agree():
    lower, upper = vectors()
    turn = one_layer.rotary()
    places = jnp.arange(40)[None, None]
    after = packed(turn(lower, places), turn(upper, places), MERGE)
    before = packed(lower, upper, MERGE)
    for layer in (LOWER, UPPER):
        np.testing.assert_allclose(after.restored(layer), turn(before.restored(layer), places), atol=3e-5)


def test_the_distinct_end_of_the_range_stays_apart_strictly():
    # Cosines 1, 0.866, 0.5, 0, -0.5.
    lower, upper = at_angles(0, 30, 60, 90, 120)
    for gamma, rows in ((0.0, []), (0.2, [4]), (0.34, [3, 4]), (1.0, [1, 2, 3, 4]), (None, [0, 1, 2, 3, 4])):
        shared = packed(lower, upper, Blend(0.6, gamma, 1.0, "distinct"))
        assert kept_apart(shared, 5) == [rows]
        assert np.array_equal(shared.restored(UPPER)[0, 0, rows], upper[0, 0, rows])
        assert np.array_equal(shared.restored(LOWER)[0, 0, rows], lower[0, 0, rows])


def test_the_printed_rule_keeps_the_alike_apart():
    lower, upper = at_angles(0, 30, 60, 90, 120)
    assert kept_apart(packed(lower, upper, Blend(0.6, 0.3, 1.0, "alike")), 5) == [[0, 1]]
    assert kept_apart(packed(lower, upper, Blend(0.6, 1.0, 0.4, "alike")), 5) == [[0, 1]]


def test_a_cap_keeps_the_most_distant_and_of_equals_the_lower_slot():
    lower, upper = at_angles(90, 120, 0, 120, 120)
    assert kept_apart(packed(lower, upper, Blend(0.6, 1.0, 0.4, "distinct")), 5) == [[1, 3]]


def test_the_cap_counts_each_rows_own_tokens():
    lower, upper = vectors(count=40)
    lower, upper = (jnp.concatenate([rows, rows]) for rows in (lower, upper))
    present = jnp.arange(40) < jnp.asarray([40, 10])[:, None, None]
    shared = Directions.pack(lower, upper, jnp.broadcast_to(present, (2, 2, 40)), Blend(0.6, 1.0, 0.25, "distinct"))
    assert [len(rows) for rows in kept_apart(shared, 40)] == [10, 10, 3, 3]


def test_opposite_vectors_stay_apart_whatever_gamma():
    lower, upper = at_angles(10, 180, 170)
    shared = packed(lower, upper, Blend(0.6, 0.0, 0.3, "distinct"))
    assert kept_apart(shared, 3) == [[1]]
    np.testing.assert_array_equal(shared.restored(UPPER)[0, 0, 1], upper[0, 0, 1])


@pytest.mark.parametrize("t", [0.4, 0.6])
def test_opposite_vectors_that_come_later_stay_apart_while_rows_are_free(t):
    blend = Blend(t, 0.0, 0.2, "distinct")
    lower, upper = at_angles(10, 180, 180)
    # Six slots, two rows; of four tokens one may stay apart, of six two.
    room = jnp.zeros((1, 1, 6, 2))
    shared = Directions.pack(room, room, jnp.zeros((1, 1, 6), bool), blend)
    assert shared.slots.shape[-1] == 2
    for slot, count in ((0, 1), (1, 4), (2, 5)):
        slot, count = jnp.full((1, 1), slot), jnp.asarray([count])
        index = int(slot[0, 0])
        shared = shared.write(slot, lower[:, :, index], upper[:, :, index], count, blend)
    assert kept_apart(shared, 6) == [[1]]
    for layer, rows in ((LOWER, lower), (UPPER, upper)):
        restored = np.asarray(shared.restored(layer))[0, 0]
        np.testing.assert_array_equal(restored[1], rows[0, 0, 1])
        # Without a row the nearer layer's vector is exact, the other's points the wrong way at its right length.
        exact = (layer == LOWER) == (t > 0.5)
        np.testing.assert_allclose(restored[2], rows[0, 0, 2] * (1 if exact else -1), atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, None])
def test_written_one_by_one_and_packed_give_the_same_pairs(gamma):
    lower, upper = vectors(count=12)
    blend = Blend(0.6, None if gamma is None else 0.0, 1.0, "distinct")
    whole = packed(lower, upper, blend)
    shared = Directions.pack(0 * lower, 0 * upper, jnp.zeros((1, 2, 12), bool), blend)
    for index in range(12):
        slot, count = jnp.full((1, 2), index), jnp.asarray([index + 1])
        shared = shared.write(slot, lower[:, :, index], upper[:, :, index], count, blend)
    for layer in (LOWER, UPPER):
        np.testing.assert_array_equal(shared.restored(layer), whole.restored(layer))


@pytest.mark.parametrize("gamma", [0.0, 0.5, None])
def test_products_and_sums_are_those_of_the_restored_vectors(gamma):
    lower, upper = vectors(count=24)
    shared = packed(lower, upper, Blend(0.6, gamma, 0.5, "distinct"))
    random = np.random.default_rng(3)
    queries, weights = random.normal(size=(1, 2, 4, 32)), random.uniform(size=(1, 2, 4, 24))
    for layer in (LOWER, UPPER):
        restored = np.asarray(shared.restored(layer), np.float64)
        found = shared.products(jnp.asarray(queries, jnp.float32), layer)
        np.testing.assert_allclose(found, np.einsum("bgtd,bgnd->bgtn", queries, restored), atol=1e-3)
        found = shared.mixed(jnp.asarray(weights, jnp.float32), layer)
        np.testing.assert_allclose(found, np.einsum("bgtn,bgnd->bgtd", weights, restored), atol=1e-3)


def halves(blend, length=20, capacity=32):
    """A pair of one row after a prompt, seen from both layers."""
    lower, upper = (one_layer.tokens([range(length)], seed=seed) for seed in (1, 2))
    pair = Pair.pack(lower, upper, jnp.ones((1, 2, length), bool), capacity, blend)
    return Half(pair, LOWER), lower, upper


def step(pair: Pair, position: int, seed: int):
    """Both layers' next token: the pair after it, and the views that attention saw."""
    views = []
    for layer in (LOWER, UPPER):
        fresh = one_layer.tokens([[position]], seed=seed + layer)
        views.append(Half(pair, layer).append(fresh))
        pair = views[-1].pair
    return pair, views


@pytest.mark.parametrize("gamma", [0.3, None])
def test_a_step_reads_as_attention_over_what_the_store_stands_for(gamma):
    half, _, _ = halves(Blend(0.6, gamma, 0.5, "distinct"))
    pair = half.pair
    for position in (20, 21, 22):
        pair, views = step(pair, position, seed=10 * position)
        for view in views:
            asked = one_layer.query([[position]])
            out, lse, probabilities = one_layer.attention(asked, *view.dense())
            part = view.read(asked)
            np.testing.assert_allclose(part.out, out, atol=1e-4)
            np.testing.assert_allclose(part.lse, lse, atol=1e-4)
            np.testing.assert_allclose(view.probabilities(asked, part.lse), probabilities, atol=1e-5)


def test_the_newest_token_is_exact_in_both_layers_and_merges_when_the_next_one_comes():
    half, _, _ = halves(MERGE)
    pair, views = step(half.pair, 20, seed=50)
    for layer, view in enumerate(views):
        fresh = one_layer.tokens([[20]], seed=50 + layer)
        np.testing.assert_array_equal(view.dense()[0][:, :, -1], fresh.keys[:, :, 0])
        assert sorted(np.asarray(view.positions())[0, 0].tolist())[-21:] == list(range(21))
    pair, views = step(pair, 21, seed=60)
    unit, norms, _ = merged(*(one_layer.tokens([[20]], seed=50 + layer).keys[:, :, 0] for layer in (0, 1)), 0.6)
    for layer, view in enumerate(views):
        np.testing.assert_allclose(view.dense()[0][:, :, 20], norms[..., layer, None] * unit, atol=1e-5)
        assert sorted(np.asarray(view.positions())[0, 0].tolist())[-22:] == list(range(22))


def test_a_row_that_has_ended_changes_nothing():
    half, _, _ = halves(MERGE)
    pair, _ = step(half.pair, 20, seed=50)
    after, _ = step(pair, -1, seed=60)
    for layer in (LOWER, UPPER):
        for before, now in zip(Half(pair, layer).dense(), Half(after, layer).dense(), strict=True):
            np.testing.assert_array_equal(before, now)


@pytest.mark.parametrize("layer", [LOWER, UPPER])
def test_a_step_makes_no_copy_of_the_pair(layer):
    half, _, _ = halves(Blend(0.6, 0.3, 0.2, "distinct"), length=400, capacity=512)
    pair, _ = step(half.pair, 400, seed=5)
    fresh, asked = one_layer.tokens([[401]]), one_layer.query([[401]])

    def one(view: Half):
        after = view.append(fresh)
        return after, after.read(asked).out

    assert one_layer.copies(one, Half(pair, layer), least=1024) == 0


def test_bytes_follow_the_closed_form():
    width, itemsize, slots, rows, heads = 32, 4, 64, 4, 2
    half, lower, _ = halves(Blend(0.6, 0.05, 1 / 16, "distinct"), capacity=slots)
    head = slots * (2 * width * itemsize + 20) + rows * (4 * width * itemsize + 8) + 2 * (2 * width * itemsize + 4)
    rotations = 2 * sum(leaf.nbytes for leaf in (lower.rotary.frequencies, lower.rotary.magnitude))
    assert nbytes(half.pair) == heads * head + rotations
    read = slots * (2 * width * itemsize + 12) + rows * (2 * width * itemsize + 8) + (2 * width * itemsize + 4)
    assert half.bytes_read() == heads * read + rotations // 2


def test_half_precision_keeps_norms_and_rounds_directions_only():
    lower, upper = (rows.astype(jnp.bfloat16) for rows in vectors())
    shared = packed(lower, upper, MERGE)
    assert shared.unit.dtype == shared.apart.dtype == jnp.bfloat16 and shared.norms.dtype == jnp.float32
    np.testing.assert_allclose(shared.norms[..., UPPER], np.linalg.norm(upper.astype(jnp.float32), axis=-1), rtol=1e-6)
    # A bfloat16 has 8 bits.
    lengths = np.linalg.norm(np.asarray(shared.restored(UPPER), np.float32), axis=-1)
    np.testing.assert_allclose(lengths, shared.norms[..., UPPER], rtol=2**-8)


def test_tokens_of_a_view_carry_its_layers_rotation():
    half, lower, _ = halves(MERGE)
    tokens = half.tokens()
    assert isinstance(tokens, Tokens) and np.array_equal(tokens.rotary.frequencies, lower.rotary.frequencies)
