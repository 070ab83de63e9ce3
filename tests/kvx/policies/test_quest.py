"""Claims about Quest (Tang et al. 2024): bounds are bounds, pages of one are exact, enough pages are everything."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvx import policies
from kvx.stores.dense import Dense
from kvx.stores.paged import Paged
from tests.kvx.policies.direct import attend, query, tokens

LENGTH = 61


def store(page, pages, group="max"):
    some = tokens(2, LENGTH)
    budget = jnp.asarray([pages], jnp.int32)
    mask = jnp.ones((1, 2, LENGTH), bool)
    return Paged.pack(some, mask, 80, page=page, budget=budget, most=pages, group=group)


def dense():
    return Dense.pack(tokens(2, LENGTH), jnp.ones((1, 2, LENGTH), bool), 80)


@pytest.mark.parametrize("page", [1, 4, 16])
def test_a_page_bounds_every_logit_in_it(page):
    kept, asked = store(page, 3), query(2, 2, LENGTH - 1)
    bounds = np.asarray(kept.bounds(asked))[0]
    logits = np.einsum("gd,gsd->gs", np.asarray(asked.rotated)[0, :, 0, 0], np.asarray(kept.inner.keys)[0])
    logits = np.where(np.arange(80) < LENGTH, logits, -np.inf).reshape(2, -1, page).max(axis=-1)
    assert np.all(bounds >= logits - 1e-5)  # rounding of the two sums
    assert np.all(np.isneginf(bounds) == np.isneginf(logits))  # empty pages are never chosen
    if page == 1:
        np.testing.assert_allclose(bounds, logits, atol=1e-5)


def test_both_forms_of_the_bound_agree():
    kept, asked = store(8, 3), query(2, 2, LENGTH - 1)
    q = np.asarray(asked.rotated)[0, :, 0, 0][:, None]
    low, high = (np.asarray(bound)[0, :, :7] for bound in np.split(np.asarray(kept.extremes), 2, axis=-1))
    wanted = np.maximum(q * high, q * low).sum(axis=-1)
    np.testing.assert_allclose(kept.bounds(asked)[0, :, :7], wanted, atol=1e-5)


def test_query_heads_share_a_choice_by_the_largest_or_the_mean_bound():
    asked = query(6, 2, LENGTH - 1)
    kept = store(8, 3)
    by_head = []
    for head in range(3):
        alone = type(asked)(asked.raw[:, :, head : head + 1], asked.positions, asked.rotary, asked.spec)
        by_head.append(np.asarray(kept.bounds(alone))[0, :, :7])
    np.testing.assert_allclose(kept.bounds(asked)[0, :, :7], np.max(by_head, axis=0), atol=1e-5)
    mean = store(8, 3, group="mean").bounds(asked)[0, :, :7]
    np.testing.assert_allclose(mean, np.mean(by_head, axis=0), atol=1e-5)


def test_pages_of_one_slot_read_the_exact_top():
    asked = query(2, 2, LENGTH - 1)
    out = np.asarray(store(1, 9).read(asked).out)[0, :, :, 0]
    some, queries = tokens(2, LENGTH), np.asarray(asked.rotated)[0, :, :, 0]
    keys, values = np.asarray(some.keys)[0], np.asarray(some.values)[0]
    for head in range(2):
        order = np.argsort(-(keys[head, :-1] @ queries[head, 0]), kind="stable")[:8]
        rows = [*order, LENGTH - 1]
        wanted = attend(queries[head : head + 1], keys[head : head + 1, rows], values[head : head + 1, rows])
        np.testing.assert_allclose(out[head], wanted[0], atol=1e-5)


def test_enough_pages_read_everything():
    asked = query(4, 2, LENGTH - 1)
    part, whole = store(16, 5).read(asked), dense().read(asked)
    np.testing.assert_allclose(part.out, whole.out, atol=1e-6)
    np.testing.assert_allclose(part.lse, whole.lse, atol=1e-6)
    np.testing.assert_allclose(
        store(16, 5).probabilities(asked, part.lse), dense().probabilities(asked, whole.lse), atol=1e-6
    )


def test_the_newest_tokens_page_is_always_read():
    kept = store(16, 1)
    index, chosen = kept.choose(query(4, 2, LENGTH - 1))
    assert np.all(np.asarray(index)[..., 0] == (LENGTH - 1) // 16)
    assert np.asarray(chosen).all()


def test_probabilities_are_zero_outside_the_pages_read_and_add_up():
    asked, kept = query(4, 2, LENGTH - 1), store(16, 2)
    found = np.asarray(kept.probabilities(asked, kept.read(asked).lse))[0, :, :, 0]
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)
    assert np.all((found.reshape(2, 2, 5, 16).sum(axis=-1) > 0).sum(axis=-1) == 2)


def test_bounds_kept_up_to_date_equal_bounds_from_scratch():
    some = tokens(2, LENGTH)
    mask, budget = jnp.arange(LENGTH) < jnp.full((1, 2, 1), 40), jnp.asarray([3], jnp.int32)
    kept = Paged.pack(some, mask, 80, page=4, budget=budget, most=3)
    for place in range(40, LENGTH):
        kept = kept.append(some.take(jnp.full((1, 2, 1), place), jnp.ones((1, 2, 1), bool)))
    scratch = store(4, 3)
    np.testing.assert_array_equal(kept.positions(), scratch.positions())
    np.testing.assert_array_equal(kept.extremes, scratch.extremes)


def test_the_first_two_layers_are_read_whole():
    policy = policies.quest(64)
    assert [len(policy.at(layer, 5).stages) for layer in range(5)] == [0, 0, 1, 1, 1]


def test_bytes_read_follow_the_closed_form():
    kept = store(16, 2)
    row = 2 * 2 * 8 * 4  # keys and values of 2 heads, 8 channels, float32
    bounds, positions = 5 * row, 2 * 80 * 4
    assert kept.bytes_read() == 32 * row + bounds + positions
