"""Claims about ranking and whole-number splits: exact counts, ties, conservation, caps."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvx.parts.ranking import largest_remainder, ranks, top

SLOTS = 12
LAYERS = 5
_top, _split, _ranks = jax.jit(top), jax.jit(largest_remainder), jax.jit(ranks)

# Few distinct values, so that ties are the rule.
scores = arrays(np.float32, (2, SLOTS), elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0, np.inf]))
masks = arrays(np.bool_, (2, SLOTS))
counts = arrays(np.int32, (2,), elements=st.integers(0, SLOTS + 3))


@settings(max_examples=100, deadline=None)
@given(scores, masks, counts)
def test_top_keeps_the_highest_and_of_equals_the_lower_positions(score, mask, count):
    found = np.asarray(_top(jnp.asarray(score), jnp.asarray(mask), jnp.asarray(count)))
    for row in range(2):
        places = np.flatnonzero(mask[row])
        best = sorted(places, key=lambda place: (-score[row, place], place))[: count[row]]
        if np.isneginf(score[row][places]).any():
            # -inf is "never kept before anything else"; among themselves and the masked, positions decide.
            best = [place for place in best if not np.isneginf(score[row, place])]
            finite = found[row] & ~np.isneginf(score[row])
            np.testing.assert_array_equal(np.flatnonzero(finite), sorted(best))
            assert found[row].sum() <= count[row] and not np.any(found[row] & ~mask[row])
        else:
            np.testing.assert_array_equal(np.flatnonzero(found[row]), sorted(best))


@settings(max_examples=50, deadline=None)
@given(scores)
def test_ranks_are_a_permutation_in_stable_descending_order(score):
    found = np.asarray(_ranks(jnp.asarray(score)))
    for row in range(2):
        order = np.argsort(found[row])
        np.testing.assert_array_equal(order, np.argsort(-score[row], kind="stable"))


shares = arrays(np.float32, (LAYERS, 1), elements=st.sampled_from([0.0, 0.01, 0.1, 0.2, 0.25, 0.5, 1.0]))
caps = arrays(np.int32, (LAYERS, 1), elements=st.integers(0, 200))


@settings(max_examples=200, deadline=None)
@given(shares, st.integers(0, 700), caps)
def test_a_split_conserves_its_total_and_respects_caps(share, total, cap):
    found = np.asarray(_split(jnp.asarray(share), jnp.asarray([total], jnp.int32), jnp.asarray(cap)))
    assert found.sum() == min(total, cap.sum())
    assert np.all((found >= 0) & (found <= cap))


@settings(max_examples=100, deadline=None)
@given(shares.filter(lambda share: share.sum() > 0), st.integers(0, 700))
def test_without_caps_nobody_is_a_slot_away_from_its_share(share, total):
    free = jnp.full((LAYERS, 1), 10_000, jnp.int32)
    found = np.asarray(_split(jnp.asarray(share), jnp.asarray([total], jnp.int32), free))
    ideal = total * share.astype(np.float64) / share.sum(dtype=np.float64)
    assert np.all(np.abs(found - ideal) < 1 + 1e-3)  # ideal shares in float32


@settings(max_examples=50, deadline=None)
@given(shares.filter(lambda share: (share > 0).all()), st.integers(0, 700), caps)
def test_larger_shares_never_get_less_beneath_equal_caps(share, total, cap):
    level = np.full_like(cap, cap.max())
    found = np.asarray(_split(jnp.asarray(share), jnp.asarray([total], jnp.int32), jnp.asarray(level)))[:, 0]
    order = np.argsort(-share[:, 0], kind="stable")
    assert np.all(np.diff(found[order]) <= 0)


def test_equal_remainders_go_to_the_lower_index():
    split = _split(jnp.ones((4, 1)), jnp.asarray([6], jnp.int32), jnp.full((4, 1), 9, jnp.int32))
    np.testing.assert_array_equal(split[:, 0], [2, 2, 1, 1])


def test_what_a_capped_entry_cannot_take_is_shared_out():
    caps = jnp.asarray([[3], [100], [100]], jnp.int32)
    split = _split(jnp.asarray([[0.8], [0.1], [0.1]]), jnp.asarray([23], jnp.int32), caps)
    np.testing.assert_array_equal(split[:, 0], [3, 10, 10])


def test_rows_are_split_for_themselves():
    share = jnp.asarray([[0.5, 0.1], [0.5, 0.9]])
    split = _split(share, jnp.asarray([4, 10], jnp.int32), jnp.full((2, 2), 50, jnp.int32))
    np.testing.assert_array_equal(split, [[2, 1], [2, 9]])
