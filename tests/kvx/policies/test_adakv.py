"""Claims about Ada-KV (Feng et al. 2024): competition between heads, its floor, its optimality and its bound."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from kvx import policies
from kvx.parts.amounts import Slots
from kvx.parts.budgets import Compete
from kvx.stores.flat import Flat
from tests.kvx.policies.direct import attend, context, evidence, kept, query, softmax, tokens
from tests.kvx.policies.test_snapkv import random_rows


def split(scores, budget, floor):
    """Slots of each head for scores (G, T)."""
    scores = jnp.asarray(scores, jnp.float32)[None]
    counts = Compete(Slots(budget), floor).counts(scores, jnp.ones(scores.shape, bool), context(scores.shape[2]))
    return np.asarray(counts)[0].tolist()


SKEWED = [[0.5, 0.3, 0.1, 0.05], [0.02, 0.02, 0.01, 0.01]]


@pytest.mark.parametrize(("floor", "counts"), [(0.0, [4, 0]), (0.2, [3, 1]), (0.5, [3, 1]), (1.0, [2, 2])])
def test_golden_splits_conserve_the_total(floor, counts):
    """The released code's rounding gives (3, 0) at 0.2 and loses a slot; every head is assured at least one here."""
    assert split(SKEWED, 2, floor) == counts


def test_the_floor_is_a_share_of_the_budget():
    scores = np.stack([np.linspace(2, 1, 30), np.linspace(0.2, 0.1, 30)])
    assert split(scores, 10, 0.2) == [18, 2]
    assert split(scores, 10, 0.5) == [15, 5]


def test_equal_heads_share_equally():
    assert split(np.broadcast_to(np.random.default_rng(0).uniform(size=20), (4, 20)), 7, 0.0) == [7] * 4


def test_no_other_split_of_the_total_keeps_more():
    scores = np.random.default_rng(1).exponential(size=(3, 6)) * [[1], [3], [0.3]]
    ordered = -np.sort(-scores, axis=1)

    def mass(counts):
        return sum(ordered[head, :count].sum() for head, count in enumerate(counts))

    best = max(mass(each) for each in itertools.product(range(7), repeat=3) if sum(each) == 9)
    found = split(scores, 3, 0.0)
    assert sum(found) == 9
    np.testing.assert_allclose(mass(found), best)


def test_a_floor_of_one_is_snapkv():
    rows = random_rows(3, 2, 4, 50)
    some, seen, where = tokens(3, 50), evidence(50, rows=rows), context(50, heads=3)
    ada = kept(policies.adakv(12, floor=1.0, window=4), some, seen, where)
    np.testing.assert_array_equal(ada, kept(policies.snapkv(12, window=4), some, seen, where))


def test_every_head_keeps_its_own_best_and_the_window():
    rows = random_rows(3, 2, 4, 50)
    some, seen, where = tokens(3, 50), evidence(50, rows=rows), context(50, heads=3)
    mask = kept(policies.adakv(12, window=4), some, seen, where)
    assert mask.sum() == 3 * 12
    for head, count in enumerate(mask.sum(axis=1)):
        alone = kept(policies.snapkv(int(count), window=4), some, seen, where)
        np.testing.assert_array_equal(mask[head], alone[head])


def test_the_output_moves_no_further_than_the_mass_lost_allows():
    """|y - y'|_1 <= 2 C sum_i (1 - m_i), C the largest |v W_o|_1: what makes the top over all heads optimal."""
    random = np.random.default_rng(2)
    weights = softmax(random.standard_normal((3, 20)) * 2)
    projected = random.standard_normal((3, 20, 8))
    flat = np.sort(weights.ravel())[-24:].min()
    cut = np.where(weights >= flat, weights, 0)
    mass = cut.sum(axis=1)
    renormalised = cut / mass[:, None]
    moved = np.abs(np.einsum("hs,hsd->d", weights - renormalised, projected)).sum()
    bound = 2 * np.abs(projected).sum(axis=-1).max() * (1 - mass).sum()
    assert 0 < moved <= bound


def test_the_flat_store_attends_like_padded_heads():
    some, mask = tokens(3, 25), np.random.default_rng(4).uniform(size=(1, 3, 25)) < np.array([0.8, 0.3, 0.1])[:, None]
    store = Flat.pack(some, jnp.asarray(mask), 64)
    asked = query(6, 3, 30)
    part = store.read(asked)
    queries = np.asarray(asked.rotated)[0, :, :, 0]
    for head in range(3):
        rows = np.flatnonzero(mask[0, head])
        wanted = attend(
            queries[head : head + 1], np.asarray(some.keys)[0, head : head + 1, rows].swapaxes(0, 1),
            np.asarray(some.values)[0, head : head + 1, rows].swapaxes(0, 1),
        )  # fmt: skip
        np.testing.assert_allclose(part.out[0, head, :, 0], wanted[0], atol=1e-5)
