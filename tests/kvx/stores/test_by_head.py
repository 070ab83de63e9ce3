"""Claims about stores by head: together they answer as one store of all heads, whatever each of them is."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.decoder import AttentionSpec
from kvx.query import Query
from kvx.stores.base import nbytes
from kvx.stores.by_head import ByHead, HeadSplit
from kvx.stores.dense import Dense
from kvx.stores.mean_token import MeanSlot
from kvx.stores.tiers import Tiers
from kvx.tokens import Tokens
from tests.kvx.stores.one_layer import WIDTH, attention, copies, rotary

G = 5


def some_tokens(positions, seed=0, stats=False) -> Tokens:
    positions = np.asarray(positions, np.int32)
    random = np.random.default_rng(seed)
    shape = (len(positions), G, positions.shape[1])
    keys, values = (random.normal(size=(*shape, WIDTH)).astype(np.float32) for _ in range(2))
    spots = jnp.asarray(np.broadcast_to(positions[:, None], shape))
    given = {"mass": jnp.asarray(random.normal(size=shape), jnp.float32)} if stats else {}
    return Tokens(jnp.asarray(keys), jnp.asarray(values), spots, rotary(), given)


def some_query(positions, seed=1) -> Query:
    positions = jnp.asarray(positions, jnp.int32)
    raw = np.random.default_rng(seed).normal(size=(*positions.shape[:1], G, 2, positions.shape[1], WIDTH))
    return Query(jnp.asarray(raw, jnp.float32), positions, rotary(), AttentionSpec(2 * G, G, WIDTH, WIDTH, WIDTH**-0.5))


PROMPT = some_tokens([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1]])
FRESH = some_tokens([[6], [4]], seed=2)
SPLIT = HeadSplit((jnp.asarray([1, 4]), jnp.asarray([0, 2, 3])))


def by_head(some=PROMPT) -> ByHead:
    """Heads 1 and 4 keep everything in 12 slots; the others the newest three, and in 6 slots."""
    whole, rest = (some.heads(heads) for heads in SPLIT.members)
    newest = jnp.max(rest.positions, axis=-1, keepdims=True)
    return ByHead((Dense.pack(whole, whole.present, 12), Dense.pack(rest, rest.positions > newest - 3, 6)), SPLIT)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(G)), st.integers(1, G - 1))
def test_joining_undoes_splitting(order, cut):
    split = HeadSplit((np.asarray(order[:cut], np.int32), np.asarray(order[cut:], np.int32)))
    array = jnp.arange(2 * G * 3).reshape(2, G, 3)
    np.testing.assert_array_equal(split.join(split.parts(array)), array)


def test_it_reads_as_one_attention_over_what_it_shows():
    store, asked = by_head().append(FRESH), some_query([[6], [4]])
    part = store.read(asked)
    out, lse, probabilities = attention(asked, *store.dense())
    np.testing.assert_allclose(part.out, out, atol=1e-5)
    np.testing.assert_allclose(part.lse, lse, atol=1e-5)
    np.testing.assert_allclose(store.probabilities(asked, part.lse), probabilities, atol=1e-5)


def test_every_head_holds_what_its_store_does_in_its_own_place():
    store = by_head().append(FRESH)
    held = [[sorted(head[head >= 0].tolist()) for head in row] for row in np.asarray(store.positions())]
    assert held[0] == [[3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6], [3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert held[1] == [[1, 2, 3, 4], [0, 1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]
    everything = {}
    for some in (PROMPT, FRESH):
        for place in zip(*np.nonzero(np.asarray(some.present)), strict=True):
            everything[place[0], place[1], int(some.positions[place])] = np.asarray(some.keys[place])
    keys, _, positions = (np.asarray(array) for array in store.dense())
    for place in zip(*np.nonzero(positions >= 0), strict=True):
        np.testing.assert_array_equal(keys[place], everything[place[0], place[1], int(positions[place])])


def test_stores_with_all_tokens_are_one_dense_store():
    parts = [PROMPT.heads(heads) for heads in SPLIT.members]
    store = ByHead(tuple(Dense.pack(part, part.present, 8) for part in parts), SPLIT).append(FRESH)
    whole, asked = Dense.pack(PROMPT, PROMPT.present, 8).append(FRESH), some_query([[6], [4]])
    for ours, theirs in zip(store.dense(), whole.dense(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(store.read(asked).out, whole.read(asked).out, atol=1e-6)


@pytest.mark.slow
def test_stores_of_any_kind_and_statistics_that_only_some_keep():
    whole, rest = (some_tokens([[0, 1, 2, 3]], stats=True).heads(heads) for heads in SPLIT.members)
    first = replace(rest, stats={})
    tiers = Tiers.moving(Dense.pack(first, first.positions > 1, 4), MeanSlot.pack(first, first.positions <= 1))
    store = ByHead((Dense.pack(whole, whole.present, 8), tiers), SPLIT)
    assert store.sizes == (8, 5)
    mass = np.asarray(store.stats["mass"])
    np.testing.assert_array_equal(mass[:, [1, 4], :4], whole.stats["mass"])
    assert np.all(mass[:, [0, 2, 3]] == 0)
    np.testing.assert_array_equal(store.positions()[0, 0], [2, 3, -1, -1, 1, -1, -1, -1])
    doubled = store.with_stats({"mass": 2 * store.stats["mass"]})
    np.testing.assert_array_equal(doubled.stats["mass"], 2 * mass)
    asked = some_query([[4]])
    part = store.read(asked)
    np.testing.assert_allclose(np.asarray(store.probabilities(asked, part.lse)).sum(axis=-1), 1, atol=1e-5)


def test_a_row_that_has_ended_appends_nothing():
    store = by_head()
    after = store.append(some_tokens([[6], [-1]], seed=2))
    np.testing.assert_array_equal(after.positions()[1], store.positions()[1])


def test_bytes_are_those_of_its_stores_and_four_a_head():
    store = by_head()
    assert nbytes(store) == sum(nbytes(part) for part in store.stores) + 4 * G
    slots = 2 * (2 * 12 + 3 * 6)
    assert nbytes(store) - 2 * nbytes(rotary()) == slots * (8 * WIDTH + 4) + 4 * G
    assert store.bytes_read() == nbytes(store) - 4 * G


@pytest.mark.parametrize("rows", [1, 2])
def test_appending_and_reading_copies_no_store(rows):
    store = jax.tree.map(lambda leaf: leaf[:rows] if leaf.ndim > 1 else leaf, by_head(some_tokens([[*range(6)]] * 2)))
    fresh, asked = some_tokens([[6]] * rows), some_query([[6]] * rows)
    assert copies(lambda held: jax.tree.leaves((after := held.append(fresh), after.read(asked))), store) == 0
