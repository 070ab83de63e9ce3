"""Claims about tiers: one softmax over several stores, and tokens that move once and are never lost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.stores.base import nbytes
from kvx.stores.coded import Code, Coded
from kvx.stores.dense import Dense
from kvx.stores.tiers import Tiers
from tests.kvx.stores.one_layer import HEADS, attention, copies, query, tokens

FIRST, SECOND = 6, 12


@partial(jax.jit, static_argnames=("bits", "stats"))
def tiered(these, high, bits=2, stats=False):
    """The tokens in `high` at full precision, the others coded."""
    kept = {"mass": 10.0 + jnp.arange(these.positions.shape[-1]) + jnp.zeros(these.positions.shape)} if stats else {}
    with_stats = type(these)(these.keys, these.values, these.positions, these.rotary, kept)
    beta = jnp.linspace(0.2, 3.0, these.keys.shape[-1]) * jnp.ones((2, HEADS, 1))
    first = Dense.pack(with_stats, high, FIRST)
    return Tiers.moving(first, Coded.pack(these, ~high, SECOND, code=Code(bits), balance=beta))


PROMPT = tokens([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, -1, -1, -1]])
HIGH = jnp.asarray(np.isin(np.asarray(PROMPT.positions), [1, 3, 4, 7]))
FRESH = tokens([[8], [5]], seed=5, mass=np.zeros((2, HEADS, 1)))


@jax.jit
def leave(store, slot, when):
    """The first tier's tokens at `slot` chosen to move."""
    return store.demote(store.tiers[0].evict(slot, when))


append = jax.jit(lambda store, fresh: store.append(fresh))


def held(store):
    """Sorted positions of every row and head, and how many."""
    slots = np.asarray(store.positions())
    return [[sorted(head[head >= 0].tolist()) for head in row] for row in slots]


@pytest.mark.parametrize("bits", [2, 4, None])
def test_read_equals_one_attention_over_the_dense_contents(bits):
    store, asked = tiered(PROMPT, HIGH, bits), query([[8], [5]])
    out, lse, probabilities = attention(asked, *store.dense())
    part = store.read(asked)
    np.testing.assert_allclose(part.out, out, atol=2e-5)
    np.testing.assert_allclose(part.lse, lse, atol=2e-5)
    np.testing.assert_allclose(store.probabilities(asked, part.lse), probabilities, atol=2e-5)


def test_an_empty_tier_and_an_ended_row_read_as_nothing():
    store = tiered(PROMPT, jnp.ones_like(HIGH) & (PROMPT.positions < FIRST))
    asked = query([[8], [-1]])
    out, _, _ = attention(asked, *store.dense())
    part = store.read(asked)
    np.testing.assert_allclose(part.out, out, atol=2e-5)
    assert np.all(np.isneginf(part.lse[1])) and np.all(np.asarray(store.probabilities(asked, part.lse))[1] == 0)


def test_slots_run_tier_after_tier():
    store = tiered(PROMPT, HIGH)
    assert store.sizes == (FIRST, SECOND)
    np.testing.assert_array_equal(store.positions()[..., :FIRST], store.tiers[0].positions())
    np.testing.assert_array_equal(store.positions()[..., FIRST:], store.tiers[1].positions())
    np.testing.assert_array_equal(store.dense()[2], store.positions())


def test_new_tokens_arrive_in_the_first_tier_exactly():
    store = append(tiered(PROMPT, HIGH), FRESH)
    keys, values, positions = store.tiers[0].dense()
    where = np.asarray(positions) == np.asarray([8, 5])[:, None, None]
    np.testing.assert_array_equal(np.asarray(keys)[where], np.asarray(FRESH.keys).reshape(-1, keys.shape[-1]))
    np.testing.assert_array_equal(np.asarray(values)[where], np.asarray(FRESH.values).reshape(-1, values.shape[-1]))


@settings(max_examples=15, deadline=None)
@given(
    slots=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    when=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_every_head_moves_its_own_token_and_none_is_lost(slots, when):
    store = tiered(PROMPT, HIGH)
    chosen = np.asarray(slots).reshape(2, HEADS)
    first = np.asarray(store.tiers[0].positions())
    victims = np.take_along_axis(first, chosen[..., None], axis=2)[..., 0]
    moves = np.asarray(when).reshape(2, HEADS) & (victims >= 0)
    marked = leave(store, jnp.asarray(chosen), jnp.asarray(moves))
    assert held(marked) == held(store)
    after = append(marked, FRESH)
    assert held(after) == [[sorted([*head, new]) for head in row] for row, new in zip(held(store), (8, 5), strict=True)]
    low, was = np.asarray(after.tiers[1].positions()), np.asarray(store.tiers[1].positions())
    for row in range(2):
        for head in range(HEADS):
            arrived = set(low[row, head].tolist()) - set(was[row, head].tolist())
            assert arrived == ({int(victims[row, head])} if moves[row, head] else set())
    np.testing.assert_array_equal(after.leaving, -1)


def test_a_moved_token_is_what_the_second_tier_would_have_packed():
    prompt = tokens([[0, 1, 2, 3], [0, 1, 2, 3]])
    late = tiered(prompt, prompt.positions < 2)
    late = append(leave(late, jnp.zeros((2, HEADS), jnp.int32), jnp.ones((2, HEADS), bool)), FRESH)
    early = tiered(prompt, prompt.positions == 1)
    for position in (0, 2, 3):
        for one, other in zip(late.tiers[1].dense()[:2], early.tiers[1].dense()[:2], strict=True):
            picked = [
                np.asarray(array)[np.asarray(store.tiers[1].positions()) == position]
                for array, store in ((one, late), (other, early))
            ]
            np.testing.assert_array_equal(*picked)


def test_a_row_that_has_ended_moves_nothing_and_keeps_its_choice():
    slot, when = jnp.asarray([[0, 1], [1, 2]]), jnp.ones((2, HEADS), bool)
    store = leave(tiered(PROMPT, HIGH), slot, when)
    after = append(store, tokens([[8], [-1]], seed=5))
    for one, other in zip(jax.tree.leaves(after.dense()), jax.tree.leaves(store.dense()), strict=True):
        seen = np.asarray(store.positions())[1] >= 0
        np.testing.assert_array_equal(np.asarray(one)[1][seen], np.asarray(other)[1][seen])
    np.testing.assert_array_equal(after.positions()[1], store.positions()[1])
    np.testing.assert_array_equal(after.leaving, [[-1, -1], [1, 2]])
    np.testing.assert_array_equal(leave(after, slot * 0 + 2, when).leaving, [[2, 2], [1, 2]])


def test_release_takes_the_overall_weakest_from_its_tier():
    store = leave(tiered(PROMPT, HIGH), jnp.zeros((2, HEADS), jnp.int32), jnp.ones((2, HEADS), bool))
    positions = np.asarray(store.positions())
    scores = jnp.asarray(np.where(positions == 2, -5.0, np.where(positions == 1, -9.0, positions)), jnp.float32)
    after = store.release(scores, jnp.asarray([[1, 0], [1, 1]]))
    assert held(after)[0] == [[0, 2, 3, 4, 5, 6, 7], list(range(8))]
    # Position 1 was about to move; it is gone, and its slot's next token must not move in its place.
    np.testing.assert_array_equal(after.leaving, [[-1, 0], [-1, -1]])
    again = after.release(scores, jnp.ones((2, HEADS), jnp.int32))
    assert held(again)[0][0] == [0, 3, 4, 5, 6, 7]


def test_statistics_live_where_a_tier_keeps_them():
    store = tiered(PROMPT, HIGH, stats=True)
    mass = np.asarray(store.stats["mass"])
    assert np.all(mass[..., FIRST:] == 0) and mass[0, 0, :4].tolist() == [11, 13, 14, 17]
    doubled = store.with_stats({"mass": store.stats["mass"] + 1})
    np.testing.assert_array_equal(doubled.tiers[0].stats["mass"], mass[..., :FIRST] + 1)
    assert doubled.tiers[1].stats == {}


def test_fixed_tiers_append_without_moving():
    parts = tiered(PROMPT, HIGH)
    store = Tiers((*parts.tiers, Dense.pack(PROMPT, jnp.zeros_like(HIGH), 4))).append(FRESH)
    assert store.leaving is None and held(store)[0][0] == list(range(9))
    assert store.positions().shape[-1] == FIRST + SECOND + 4


def test_bytes_are_the_sum_of_the_tiers_and_the_choice():
    store = tiered(PROMPT, HIGH)
    assert nbytes(store) == sum(nbytes(tier) for tier in store.tiers) + 4 * 2 * HEADS
    assert store.bytes_read() == sum(nbytes(tier) for tier in store.tiers)


def test_a_step_writes_in_place_where_moving_at_once_would_copy():
    store, asked = tiered(PROMPT, HIGH, stats=True), query([[8], [5]])

    def weakest(store, lse):
        return jnp.argmin(store.probabilities(asked, lse)[:, :, 0, 0, :FIRST], axis=-1), jnp.ones((2, HEADS), bool)

    def step(store):
        store = store.append(FRESH)
        part = store.read(asked)
        slot, when = weakest(store, part.lse)
        return part.out, store.demote(store.tiers[0].evict(slot, when))

    def at_once(store):
        store = store.append(FRESH)
        first, second = store.tiers
        part = store.read(asked)
        slot, when = weakest(store, part.lse)
        return part.out, Tiers((first.evict(slot, when), second.append(first.take(slot, when))), store.leaving)

    assert copies(step, store) == 0
    assert copies(at_once, store) > 0
