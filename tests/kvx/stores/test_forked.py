"""Claims about forked stores (Hydragen): equal to copies of the prefix, which is held, read and left as one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.query import Query
from kvx.stores.base import nbytes
from kvx.stores.dense import Dense
from kvx.stores.forked import Forked, Shared
from kvx.stores.pages import Pages, pages_for
from kvx.tokens import Tokens, concatenate
from tests.kvx.stores.one_layer import HEADS, attention, query, rotary, tokens

COPIES = (2, 3, 2)
"""Of each fork in turn: 2 rows become 4, 12 and 24."""
LENGTHS = [(5, 9), (3, 0, 4, 2)]
"""Tokens of each row before the first fork, and those that each then adds before the next (ragged, one none)."""


read = jax.jit(lambda store, asked: store.read(asked))
append = jax.jit(lambda store, fresh: store.append(fresh))
chances = jax.jit(lambda store, asked, lse: store.probabilities(asked, lse))


def paged(these: Tokens) -> Pages:
    count = int(jnp.sum(pages_for(jnp.sum(these.present, axis=-1), 4, 8)))
    return Pages.pack(these, these.present, count, page=4, longest=these.positions.shape[-1], room=8)


def following(starts, counts, seed: int) -> Tokens:
    """Tokens of each row from its next position on, none beyond its count."""
    index = np.arange(max(max(counts), 1))
    where = np.asarray(starts)[:, None] + index
    return tokens(np.where(index < np.asarray(counts)[:, None], where, -1), seed=seed)


def repeated(these: Tokens, copies: int) -> Tokens:
    return replace(
        these,
        keys=jnp.repeat(these.keys, copies, axis=0),
        values=jnp.repeat(these.values, copies, axis=0),
        positions=jnp.repeat(these.positions, copies, axis=0),
    )


def grown(levels: int) -> tuple[Forked | Pages, Tokens, np.ndarray]:
    """A store forked so many times, all tokens copied into every row, and each row's next position."""
    rows = np.asarray(LENGTHS[0])
    everything = following([0, 0], rows, seed=0)
    store, next = paged(everything), rows
    for level in range(levels):
        store, everything = store.fork(COPIES[level]), repeated(everything, COPIES[level])
        next = np.repeat(next, COPIES[level])
        counts = np.resize(LENGTHS[1], len(next))
        more = following(next, counts, seed=level + 1)
        store, everything, next = append(store, more), concatenate(everything, more), next + counts
    return store, everything, next


@pytest.mark.sampled
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 3])
def test_a_fork_equals_attention_with_the_prefix_copied_into_every_row(levels, length):
    store, everything, next = grown(levels)
    asked = query(next[:, None] + np.arange(length))
    out, lse, _ = attention(asked, everything.keys, everything.values, everything.positions)
    part = read(store, asked)
    np.testing.assert_allclose(part.out, out, atol=2e-5)
    np.testing.assert_allclose(part.lse, lse, atol=2e-5)
    assert len(store.levels) == levels and [len(level.store.used) for level in store.levels] == [2, 4, 12][:levels]


@pytest.mark.sampled
@pytest.mark.parametrize("levels", [1, 3])
def test_what_it_stands_for_and_its_probabilities_are_in_one_order(levels):
    store, _everything, next = grown(levels)
    asked = query(next[:, None])
    keys, values, positions = store.dense()
    for row in range(len(next)):
        for head in range(HEADS):
            held = np.asarray(positions[row, head])
            assert sorted(held[held >= 0].tolist()) == list(range(next[row]))
    out, lse, probabilities = attention(asked, keys, values, positions)
    np.testing.assert_allclose(read(store, asked).out, out, atol=2e-5)
    np.testing.assert_allclose(chances(store, asked, jnp.asarray(lse, jnp.float32)), probabilities, atol=2e-5)
    np.testing.assert_array_equal(store.positions(), positions)


@pytest.mark.sampled
@pytest.mark.parametrize("window", [3, 6])
def test_a_sliding_window_ends_at_another_place_of_the_prefix_for_every_row(window):
    store, everything, next = grown(2)
    asked = query(next[:, None])
    asked = replace(asked, spec=replace(asked.spec, window=window))
    whole = Dense.pack(everything, everything.present, everything.positions.shape[-1])
    np.testing.assert_allclose(read(store, asked).out, read(whole, asked).out, atol=2e-6)


@pytest.mark.slow
def test_an_empty_prefix_and_an_empty_suffix_are_identities():
    suffix = tokens([[0, 1]] * 4, seed=3)
    forked = append(paged(following([0, 0], [0, 0], seed=0)).fork(2), suffix)
    asked = query([[2]] * 4)
    alone = paged(suffix)
    np.testing.assert_array_equal(read(forked, asked).out, read(alone, asked).out)
    np.testing.assert_array_equal(read(forked, asked).lse, read(alone, asked).lse)
    prefix = paged(tokens([[0, 1], [0, -1]], seed=4))
    found, wanted = read(prefix.fork(2), asked), read(prefix, query([[2]] * 2))
    first = Query(asked.raw[::2], asked.positions[::2], rotary(), asked.spec)
    np.testing.assert_allclose(found.out[::2], read(prefix, first).out, atol=1e-6)
    assert wanted.out.shape == found.out[::2].shape


def test_rows_of_one_group_that_change_places_change_their_outputs_only():
    store, _, next = grown(1)
    asked, order = query(next[:, None]), np.asarray([1, 0, 2, 3])
    other = Forked(store.levels, replace(store.own, table=store.own.table[order], used=store.own.used[order]))
    moved = replace(asked, raw=asked.raw[order], positions=asked.positions[order])
    np.testing.assert_allclose(read(other, moved).out, read(store, asked).out[order], atol=1e-6)


def test_the_prefix_is_not_causal_among_the_queries_of_its_rows():
    """The first of a group's queries is the oldest, and still sees all of the prefix."""
    store = paged(following([0, 0], [5, 9], seed=0)).fork(2)
    asked = query([[5], [8], [9], [12]])
    seen = np.asarray(chances(store, asked, read(store, asked).lse))[..., 0, :] > 0
    assert seen.sum(axis=-1).tolist() == [[[5, 5]] * 2] * 2 + [[[9, 9]] * 2] * 2


def test_the_parent_is_shared_and_stays_as_it_is_bit_for_bit():
    parent = paged(following([0, 0], [5, 9], seed=0))
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(parent)]
    child = parent.fork(3)
    assert child.levels[0].store is parent, "nothing is copied"
    child = child.append(following(np.repeat([5, 9], 3), [1] * 6, seed=2))
    child = child.fork(2).append(following(np.repeat([6, 10], 6), [1] * 12, seed=3))
    for leaf, was in zip(jax.tree.leaves(parent), before, strict=True):
        np.testing.assert_array_equal(leaf, was)
    assert child.levels[0].store is parent


def test_a_shared_level_is_held_and_read_once():
    parent = paged(following([0, 0], [5, 9], seed=0))
    four = parent.fork(4)
    assert nbytes(four) == nbytes(parent) + nbytes(four.own)
    # No own token yet: of the own store, only its tables are read.
    assert four.bytes_read() == parent.bytes_read() + four.own.table.nbytes + four.own.used.nbytes
    assert parent.fork(40).bytes_read() - four.bytes_read() == 9 * (four.own.table.nbytes + four.own.used.nbytes)


def test_a_row_that_has_ended_reads_nothing_of_the_prefix():
    store, _, next = grown(1)
    positions = np.where(np.arange(4) == 2, -1, next)[:, None]
    part = read(store, query(positions))
    assert np.isneginf(np.asarray(part.lse[2])).all() and np.isfinite(np.asarray(part.lse)[[0, 1, 3]]).all()


def test_taking_back_own_tokens_leaves_the_prefix():
    store = paged(following([0, 0], [5, 9], seed=0)).fork(2)
    after = append(store, following([5, 5, 9, 9], [2, 2, 2, 2], seed=1)).crop(jnp.asarray([6, 5, 9, 11]))
    held = np.asarray(after.positions())
    assert [(row[0] >= 0).sum() for row in held] == [6, 5, 9, 11]


def test_any_store_can_be_a_level():
    """Sharing is a wrapper: a dense level under paged rows reads as one."""
    these = following([0, 0], [5, 9], seed=0)
    child = paged(these).fork(2)
    mixed = replace(child, levels=(Shared(Dense.pack(these, these.present, 9)),))
    asked = query([[5], [5], [9], [9]])
    np.testing.assert_allclose(read(mixed, asked).out, read(child, asked).out, atol=1e-6)
