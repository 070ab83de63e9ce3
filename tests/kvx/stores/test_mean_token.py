"""Claims about the mean token: exact for equal keys, the log-count form, a running mean, growth, no change."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.kernels.merge_partials import merge_partials
from kvx.stores.base import nbytes
from kvx.stores.dense import Dense
from kvx.stores.mean_token import MeanSlot
from tests.kvx.stores.one_layer import GROUP, HEADS, SPEC, WIDTH, attention, query, tokens

PROMPT = tokens([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1]])
EVERYTHING = jnp.ones((2, HEADS, 6), bool)


def equal_keys(some):
    """The tokens with the first one's key everywhere."""
    return replace(some, keys=jnp.broadcast_to(some.keys[:, :, :1], some.keys.shape))


def test_equal_keys_make_it_exact_whatever_the_values():
    some, asked = equal_keys(PROMPT), query([[6], [4]])
    part = MeanSlot.pack(some, EVERYTHING).read(asked)
    out, lse, _ = attention(asked, some.keys, some.values, some.positions)
    np.testing.assert_allclose(part.out, out, atol=1e-5)
    np.testing.assert_allclose(part.lse, lse, atol=1e-5)


def test_unequal_keys_get_less_mass_than_they_had():
    """Jensen: the exponential of a mean is at most the mean of exponentials."""
    for seed in range(5):
        asked = query([[6], [4]], seed=seed)
        part = MeanSlot.pack(PROMPT, EVERYTHING).read(asked)
        _, lse, _ = attention(asked, PROMPT.keys, PROMPT.values, PROMPT.positions)
        assert np.all(np.asarray(part.lse) < lse)


def test_beside_kept_tokens_it_is_formula_7():
    """o = (n exp(q.k_c) v_c + sum exp(q.k_j) v_j) / (n exp(q.k_c) + sum exp(q.k_j)), in float64."""
    asked, dropped = query([[6], [4]]), jnp.asarray(np.isin(PROMPT.positions, [1, 2, 3]))
    kept = Dense.pack(PROMPT, ~dropped, 6)
    found = merge_partials(kept.read(asked), MeanSlot.pack(PROMPT, dropped).read(asked)).out
    keys, values, q = (np.asarray(each, np.float64) for each in (PROMPT.keys, PROMPT.values, asked.rotated))
    for row in range(2):
        for head in range(HEADS):
            away = np.asarray(dropped)[row, head]
            stay = ~away & (np.asarray(PROMPT.positions)[row, head] >= 0)
            for one in range(GROUP):
                logit = lambda key: np.exp(SPEC.scale * key @ q[row, head, one, 0])  # noqa: B023, E731
                mass = away.sum() * logit(keys[row, head, away].mean(axis=0))
                weights = logit(keys[row, head, stay])
                top = mass * values[row, head, away].mean(axis=0) + weights @ values[row, head, stay]
                np.testing.assert_allclose(found[row, head, one, 0], top / (mass + weights.sum()), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 5), unique=True, max_size=6), st.integers(0, 6))
def test_one_by_one_or_together_gives_the_mean_of_all(places, first):
    """Whatever comes with the prompt and whatever later."""
    mask = np.isin(np.arange(6), places) & np.ones((2, HEADS, 1), bool)
    together = MeanSlot.pack(PROMPT, jnp.asarray(mask))
    store = MeanSlot.pack(PROMPT, jnp.asarray(mask & np.isin(np.arange(6), places[:first])))
    for place in places[first:]:
        store = store.append(PROMPT.take(jnp.full((2, HEADS, 1), place), jnp.ones((2, HEADS, 1), bool)))
    np.testing.assert_array_equal(store.count, together.count)
    np.testing.assert_array_equal(store.newest, together.newest)
    there = mask & (np.asarray(PROMPT.positions) >= 0)
    for mean, batch, rows in ((store.key, together.key, PROMPT.keys), (store.value, together.value, PROMPT.values)):
        wanted = np.where(there[..., None], np.asarray(rows, np.float64), 0).sum(axis=2)
        wanted /= np.maximum(there.sum(axis=-1), 1)[..., None]
        np.testing.assert_allclose(mean, wanted, atol=1e-5)
        np.testing.assert_allclose(batch, wanted, atol=1e-5)


def test_a_mean_of_many_tokens_still_hears_the_next():
    """In 16 bits the count alone would have swallowed it."""
    store = replace(MeanSlot.pack(PROMPT, EVERYTHING), count=jnp.full((2, HEADS), 100_000))
    one = PROMPT.take(jnp.zeros((2, HEADS, 1), jnp.int32), jnp.ones((2, HEADS, 1), bool))
    after = store.append(one)
    expected = np.asarray(store.value) + (np.asarray(one.values)[:, :, 0] - np.asarray(store.value)) / 100_001
    np.testing.assert_allclose(after.value, expected, rtol=1e-6)
    assert np.all(np.asarray(after.value) != np.asarray(store.value))
    np.testing.assert_array_equal(after.count, 100_001)


def test_the_weight_grows_with_the_logarithm_of_the_count():
    asked, store = query([[9], [9]]), MeanSlot.pack(equal_keys(PROMPT), EVERYTHING)
    base = np.asarray(store.read(asked).lse) - np.log(np.asarray(store.count))[..., None, None]
    for index in range(3):
        store = store.append(tokens_like(store, position=6 + index))
        counts = np.log([[[[7 + index]]], [[[5 + index]]]])
        np.testing.assert_allclose(store.read(asked).lse, base + counts, atol=1e-5)


def tokens_like(store, position):
    """One token a head with the store's own mean key, which leaves that as it is."""
    held = store.tokens()
    return replace(held, positions=jnp.full_like(held.positions, position))


def test_a_token_at_no_position_changes_nothing():
    store = MeanSlot.pack(PROMPT, EVERYTHING)
    after = store.append(tokens([[6], [-1]], seed=3))
    for name in ("key", "value", "count", "newest"):
        np.testing.assert_array_equal(getattr(after, name)[1], getattr(store, name)[1])
        assert np.all(np.asarray(getattr(after, name)[0]) != np.asarray(getattr(store, name)[0]))


def test_empty_it_reads_as_nothing_and_shows_no_position():
    store, asked = MeanSlot.pack(PROMPT, ~EVERYTHING), query([[6], [4]])
    part = store.read(asked)
    assert np.all(np.isneginf(part.lse)) and np.all(np.asarray(part.out) == 0)
    np.testing.assert_array_equal(store.positions(), -1)
    np.testing.assert_array_equal(store.probabilities(asked, jnp.zeros_like(part.lse)), 0)


def test_it_reports_the_newest_position_and_its_means():
    store = MeanSlot.pack(PROMPT, EVERYTHING)
    keys, values, positions = store.dense()
    np.testing.assert_array_equal(positions[..., 0], [[5, 5], [3, 3]])
    np.testing.assert_allclose(keys[0, :, 0], np.asarray(PROMPT.keys[0]).mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(values[1, :, 0], np.asarray(PROMPT.values[1, :, :4]).mean(axis=1), atol=1e-5)


def test_its_probability_is_that_of_all_it_stands_for():
    asked, dropped = query([[6], [4]]), jnp.asarray(np.isin(PROMPT.positions, [1, 2, 3]))
    some = equal_keys(PROMPT)
    store, kept = MeanSlot.pack(some, dropped), Dense.pack(some, ~dropped, 6)
    lse = merge_partials(kept.read(asked), store.read(asked)).lse
    _, _, probabilities = attention(asked, some.keys, some.values, some.positions)
    expected = np.where(np.asarray(dropped)[:, :, None, None], probabilities, 0).sum(axis=-1)
    np.testing.assert_allclose(store.probabilities(asked, lse)[..., 0], expected, atol=1e-5)


@pytest.mark.parametrize("position", [4, -1])
def test_queries_that_see_none_of_it_get_nothing(position):
    """A query before its newest token, and one of a row that has ended."""
    part = MeanSlot.pack(PROMPT, EVERYTHING).read(query([[position], [position]]))
    assert np.all(np.isneginf(part.lse[0])) and np.all(np.asarray(part.out[0]) == 0)


def test_a_sliding_window_leaves_it_behind_with_its_newest_token():
    asked = query([[8], [8]])
    asked = replace(asked, spec=replace(asked.spec, window=4))
    lse = np.asarray(MeanSlot.pack(PROMPT, EVERYTHING).read(asked).lse)
    assert np.all(np.isfinite(lse[0])) and np.all(np.isneginf(lse[1]))


def test_bytes_are_two_means_a_count_and_a_position():
    store = MeanSlot.pack(PROMPT, EVERYTHING)
    assert nbytes(store) - nbytes(store.rotary) == 2 * HEADS * (4 * 2 * WIDTH + 4 + 4)
