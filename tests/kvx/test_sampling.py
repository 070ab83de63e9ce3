"""Sampling: each filter against its definition, draws that depend on seed and true position only."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import kvx
from kvx.sampling import allowed, next_token


def candidates(logits, **rule) -> set[int]:
    """Tokens that a rule leaves."""
    left = allowed(jnp.asarray([logits], jnp.float32), kvx.sampling(temperature=1.0, **rule))
    return set(np.flatnonzero(np.isfinite(np.asarray(left[0]))).tolist())


distinct = st.lists(st.integers(-500, 500), min_size=2, max_size=12, unique=True).map(
    lambda values: [value / 100 for value in values]
)


@settings(deadline=None, max_examples=60)
@given(distinct, st.integers(1, 15))
def test_top_k_leaves_the_k_most_likely(logits, k):
    assert candidates(logits, top_k=k) == set(np.argsort(logits)[::-1][:k].tolist())


@settings(deadline=None, max_examples=60)
@given(distinct, st.floats(0.05, 1.0))
def test_top_p_leaves_the_fewest_that_reach_p(logits, p):
    chances = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(logits)[::-1]
    before = np.cumsum(chances[order]) - chances[order]
    if np.abs(before - p).min() > 1e-5:  # a tie within float32 may go either way
        assert candidates(logits, top_p=p) == set(order[before < p].tolist())


@settings(deadline=None, max_examples=60)
@given(distinct, st.floats(0.01, 0.99))
def test_min_p_leaves_those_at_least_that_share_as_likely_as_the_first(logits, p):
    ratio = np.exp(np.array(logits) - max(logits))
    if np.abs(ratio - p).min() > 1e-5:
        assert candidates(logits, min_p=p) == set(np.flatnonzero(ratio >= p).tolist())


def test_the_most_likely_token_survives_every_filter():
    assert candidates([0.0, 3.0, 1.0], top_k=1) == {1}
    assert candidates([0.0, 3.0, 1.0], top_p=0.0) == {1}
    assert candidates([0.0, 3.0, 1.0], min_p=1.0) == {1}


def draws(logits, seeds, positions, **rule) -> np.ndarray:
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return np.asarray(next_token(logits, kvx.sampling(**rule), keys, jnp.asarray(positions), None))


def test_draws_follow_the_softmax():
    """Chi-square over 20,000 positions against the exact law, at a level of one in a million."""
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    count = 20_000
    drawn = draws(jnp.broadcast_to(logits, (count, 4)), np.zeros(count), np.arange(count), temperature=1.0)
    observed, expected = np.bincount(drawn, minlength=4), count * np.array([0.5, 0.3, 0.15, 0.05])
    assert ((observed - expected) ** 2 / expected).sum() < 30.7


def test_a_draw_depends_on_seed_and_position_and_not_on_the_place_in_the_batch():
    logits = jnp.zeros((6, 50))
    together = draws(logits, [1, 1, 2, 2, 1, 3], [7, 8, 7, 8, 7, 7], temperature=1.0)
    alone = [draws(logits[:1], [seed], [place], temperature=1.0)[0] for seed, place in ((1, 7), (1, 8), (2, 7), (3, 7))]
    assert together[0] == together[4] == alone[0]
    assert (together[1], together[2], together[5]) == tuple(alone[1:])
    assert len(set(together.tolist())) > 2


def test_greedy_takes_the_lowest_of_equals_and_ignores_the_seed():
    logits = jnp.asarray([[1.0, 4.0, 4.0], [0.0, 0.0, -1.0]])
    assert draws(logits, [0, 9], [3, 3]).tolist() == [1, 0]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = jnp.asarray([[2.0, 1.5, -1.0]])
    rule = kvx.sampling(repetition_penalty=2.0)
    keys = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32))
    said = jnp.asarray([[True, False, False]])
    assert int(next_token(logits, rule, keys, jnp.zeros(1, jnp.int32), said)[0]) == 1
    assert int(next_token(-logits, rule, keys, jnp.zeros(1, jnp.int32), jnp.asarray([[False, False, True]]))[0]) == 2
