"""Claims about pages: any table reads as contiguous slots do, heads take what they fill, unused slots do not exist."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.stores.base import nbytes
from kvx.stores.dense import Dense
from kvx.stores.pages import Pages, pages_for
from tests.kvx.stores.one_layer import HEADS, WIDTH, attention, query, tokens

LENGTHS = (11, 4)
ROOM = 6
PROMPT = tokens([list(range(11)), [*range(4), *[-1] * 7]])
# Heads that hold different numbers of tokens, as after a selection.
MASK = PROMPT.present & ~((jnp.arange(HEADS)[:, None] == 1) & (PROMPT.positions % 3 == 1))
FRESH = tokens([[11], [4]], seed=5)
ASKED = query([[12], [6]])


read = jax.jit(lambda store, asked: store.read(asked))
append = jax.jit(lambda store, fresh: store.append(fresh))
chances = jax.jit(lambda store, asked, lse: store.probabilities(asked, lse))


def packed(page: int = 4, room: int = ROOM, mask=MASK) -> Pages:
    counts = pages_for(jnp.sum(mask, axis=-1), page, room)
    return Pages.pack(PROMPT, mask, int(jnp.sum(counts)), page=page, longest=11, room=room)


def slots_by_page(store: Pages):
    """True positions in the pool (N, p), without those that fill lanes."""
    return store.slots[: len(store.keys) * store.page].reshape(-1, store.page)


def shuffled(store: Pages, seed: int) -> Pages:
    """The same store with its pages in another order, and pages of nobody among them."""
    random, count = np.random.default_rng(seed), len(store.keys)
    order = random.permutation(count + 3)[:count]
    table = np.asarray(store.table)

    def moved(array):
        return jnp.full((count + 3, *array.shape[1:]), 7, array.dtype).at[order].set(array)

    return replace(
        store,
        keys=moved(store.keys),
        values=moved(store.values),
        slots=moved(slots_by_page(store)).reshape(-1),
        table=jnp.asarray(np.where(table >= 0, order[np.maximum(table, 0)], -1), jnp.int32),
    )


def poisoned(store: Pages) -> Pages:
    """Not-a-number in every slot that holds no token."""
    page = store.page
    held = np.zeros(store.keys.shape[:2], bool)
    for (row, head, run), which in np.ndenumerate(np.asarray(store.table)):
        if which >= 0:
            held[which] = run * page + np.arange(page) < int(store.used[row, head])
    bad = jnp.asarray(~held)[..., None]
    return replace(
        store,
        keys=jnp.where(bad, jnp.nan, store.keys),
        values=jnp.where(bad, jnp.nan, store.values),
        slots=jnp.where(bad[..., 0], 3, slots_by_page(store)).reshape(-1),
    )


def same(one, other, asked=ASKED):
    part, wanted = read(one, asked), read(other, asked)
    np.testing.assert_allclose(part.out, wanted.out, atol=1e-6)
    np.testing.assert_allclose(part.lse, wanted.lse, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(page=st.sampled_from([1, 3, 4, 16]), seed=st.integers(0, 99))
def test_any_table_reads_as_contiguous_slots_do(page, seed):
    store = poisoned(shuffled(packed(page), seed))
    dense = Dense.pack(PROMPT, MASK, 17)
    same(store, dense)
    same(append(store, FRESH), append(dense, FRESH))


def test_pages_that_move_with_their_table_change_nothing():
    store = packed()
    other = shuffled(store, 1)
    for one, moved in zip(store.dense(), other.dense(), strict=True):
        np.testing.assert_array_equal(one, moved)
    np.testing.assert_array_equal(read(store, ASKED).out, read(other, ASKED).out)


def test_read_and_probabilities_equal_one_attention_over_the_dense_contents():
    store = append(packed(), FRESH)
    out, lse, probabilities = attention(ASKED, *store.dense())
    part = read(store, ASKED)
    np.testing.assert_allclose(part.out, out, atol=2e-5)
    np.testing.assert_allclose(part.lse, lse, atol=2e-5)
    np.testing.assert_allclose(chances(store, ASKED, part.lse), probabilities, atol=2e-5)


@pytest.mark.slow
def test_a_read_of_many_turns_is_one_softmax():
    """300 tokens at 4 a page are more than a turn of the loop takes; the rows end in different turns."""
    long = tokens([list(range(300)), [*range(40), *[-1] * 260]])
    store = Pages.pack(long, long.present, 2 * HEADS * 77, page=4, longest=300, room=8)
    asked = query([[300], [40]])
    same(store, Dense.pack(long, long.present, 300), asked)
    dense = Dense.pack(long, long.present, 308)
    lse = read(store, asked).lse
    np.testing.assert_allclose(chances(store, asked, lse), chances(dense, asked, lse), atol=1e-6)


def test_an_empty_store_and_an_ended_row_read_as_nothing():
    empty = packed(mask=jnp.zeros_like(MASK))
    part = read(empty, ASKED)
    assert np.all(np.isneginf(part.lse)) and np.all(np.asarray(part.out) == 0)
    part = read(packed(), query([[12], [-1]]))
    assert np.all(np.isneginf(part.lse[1])) and np.all(np.asarray(part.out[1]) == 0)


def test_a_head_owns_as_many_pages_as_it_fills_and_none_is_owned_twice():
    store = packed(page=4)
    counts = np.asarray(jnp.sum(MASK, axis=-1))
    assert counts.tolist() == [[11, 7], [4, 3]]
    table = np.asarray(store.table)
    assert (table >= 0).sum(axis=-1).tolist() == [[5, 4], [3, 3]], "ceil((count + 6) / 4)"
    owned = table[table >= 0]
    assert sorted(owned.tolist()) == list(range(15)) and len(store.keys) == 15
    assert len(store.slots) == 128, "60 slots, and what fills lanes"
    assert nbytes(store) == 15 * 4 * 2 * WIDTH * 4 + 128 * 4 + 4 * (5 + 1) * 2 * HEADS + nbytes(store.rotary)
    assert store.bytes_read() == (3 + 2 + 1 + 1) * 4 * (2 * WIDTH * 4 + 4) + 4 * (5 + 1) * 2 * HEADS


def test_an_append_takes_the_next_slot_of_the_last_page_or_the_first_of_the_next():
    store = packed(page=4)
    after = append(store, FRESH)
    changed = {tuple(place) for place in np.argwhere(slots_by_page(after) != slots_by_page(store)).tolist()}
    np.testing.assert_array_equal(after.slots[60:], store.slots[60:])
    table = np.asarray(store.table)
    # Heads held 11, 7, 4 and 3 tokens: the third begins its second page.
    wanted = {(table[0, 0, 2], 3), (table[0, 1, 1], 3), (table[1, 0, 1], 0), (table[1, 1, 0], 3)}
    assert changed == {(int(page), place) for page, place in wanted}
    assert np.asarray(after.used).tolist() == [[12, 8], [5, 4]]


def test_several_tokens_at_once_equal_one_after_the_other():
    """The second row has two of three."""
    three = tokens([[11, 12, 13], [4, 5, -1]], seed=5)
    at_once, one_by_one = append(packed(), three), packed()
    for place in range(3):
        index = jnp.full((2, HEADS, 1), place)
        one_by_one = append(one_by_one, three.take(index, three.present[..., place : place + 1]))
    for one, other in zip(jax.tree.leaves(at_once), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_row_that_has_ended_and_a_head_without_room_write_nowhere():
    store = packed(page=4, room=1)
    ended = append(store, tokens([[11], [-1]], seed=5))
    np.testing.assert_array_equal(ended.used[1], store.used[1])
    held = np.asarray(store.table)[1]
    np.testing.assert_array_equal(slots_by_page(ended)[held[held >= 0]], slots_by_page(store)[held[held >= 0]])
    # The first head of row 0 has three pages for 12 tokens; a 13th must not land in another's.
    over = append(append(store, FRESH), tokens([[12], [-1]], seed=6))
    others = np.setdiff1d(np.arange(len(store.keys)), np.asarray(store.table)[0])
    np.testing.assert_array_equal(over.keys[others], append(store, FRESH).keys[others])


def test_taking_back_the_newest_tokens_is_as_if_they_had_never_come():
    store, two = packed(), tokens([[11, 12], [4, 5]], seed=5)
    after = append(store, two).crop(jnp.asarray([12, 4]))
    assert np.asarray(after.used).tolist() == [[12, 8], [4, 3]]
    stays = jnp.broadcast_to(jnp.asarray([True, False])[:, None, None], (2, HEADS, 1))
    same(after, append(store, two.take(jnp.zeros((2, HEADS, 1), jnp.int32), stays)), query([[13], [6]]))


@pytest.mark.parametrize("page", [4, 16])
def test_a_step_writes_into_the_pool_in_place(page):
    def step(store):
        store = store.append(FRESH)
        return store.read(ASKED).out, store

    store = packed(page)
    leaves, tree = jax.tree.flatten(store)
    text = jax.jit(lambda leaves: step(tree.unflatten(leaves)), donate_argnums=0).lower(leaves).compile().as_text()
    pool = ",".join(map(str, store.keys.shape))
    assert not [line for line in text.splitlines() if f"f32[{pool}]" in line and " copy(" in line]
