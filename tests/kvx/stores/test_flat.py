"""Claims about the flat store: heads share a run of slots, and whatever one frees any other may fill."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.stores.base import Store
from kvx.stores.dense import Dense
from kvx.stores.flat import Flat
from tests.kvx.policies.direct import query, tokens

HEADS, LENGTH, WIDTH = 3, 20, 8


def filled(total=40, seed=0):
    """Heads of different length in one run, and the same tokens in a dense store; both with two statistics."""
    random = np.random.default_rng(seed)
    some = tokens(HEADS, LENGTH, WIDTH, seed)
    some = replace(some, rotary=replace(some.rotary, magnitude=jnp.float32(1)))
    stats = {"worth": jnp.asarray(random.uniform(size=(1, HEADS, LENGTH)), jnp.float32)}
    stats["kind"] = jnp.asarray(random.integers(0, 3, (1, HEADS, LENGTH)), jnp.int8)
    some = replace(some, stats=stats)
    mask = jnp.asarray(random.uniform(size=(1, HEADS, LENGTH)) < np.array([0.8, 0.4, 0.1])[:, None])
    return Flat.pack(some, mask, total), Dense.pack(some, mask, LENGTH + 12)


def token(position, seed, present=True):
    """One fresh token of every head."""
    fresh = tokens(HEADS, 1, WIDTH, seed)
    at = jnp.full((1, HEADS, 1), position if present else -1, jnp.int32)
    stats = {"worth": jnp.full((1, HEADS, 1), 0.5), "kind": jnp.full((1, HEADS, 1), seed % 3, jnp.int8)}
    return replace(fresh, positions=at, stats=stats)


def by_position(store):
    """What every head holds, by position: key, value and statistics."""
    some = store.tokens()
    heads = []
    for head in range(HEADS):
        at = np.asarray(some.positions)[0, head]
        order = np.flatnonzero(at >= 0)[np.argsort(at[at >= 0])]
        parts = [some.keys, some.values, some.positions, *(some.stats[name] for name in sorted(some.stats))]
        heads.append([np.asarray(part)[0, head][order] for part in parts])
    return heads


def same(flat, dense):
    for own, other in zip(by_position(flat), by_position(dense), strict=True):
        for mine, theirs in zip(own, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_it_holds_reads_and_frees_what_heads_of_their_own_arrays_do():
    """A run of appends and evictions, in which the heads' shares of the 40 slots move."""
    flat, dense = filled()
    assert isinstance(flat, Store)
    random = np.random.default_rng(5)
    for step in range(12):
        fresh = token(LENGTH + step, step)
        flat, dense = flat.append(fresh), dense.append(fresh)
        asked = query(2 * HEADS, HEADS, LENGTH + step, WIDTH, seed=step)
        part, wanted = flat.read(asked), dense.read(asked)
        np.testing.assert_allclose(part.out, wanted.out, atol=1e-6)
        np.testing.assert_allclose(part.lse, wanted.lse, atol=1e-6)
        excess = jnp.asarray(random.integers(0, 2, (1, HEADS)), jnp.int32).at[0, step % HEADS].set(1)
        flat, dense = (store.release(store.stats["worth"], excess) for store in (flat, dense))
        same(flat, dense)


def test_probabilities_are_those_of_the_owners():
    flat, _ = filled()
    asked = query(2 * HEADS, HEADS, LENGTH, WIDTH)
    found = np.asarray(flat.probabilities(asked, flat.read(asked).lse))
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)
    foreign = np.asarray(flat.positions())[0, 0] < 0
    assert foreign.any() and not found[0, 0, :, 0][:, foreign].any()


def test_a_freed_slot_serves_any_head():
    flat, _ = filled(total=40)
    held = int(jnp.sum(flat.slots >= 0))
    # No slot is left but those that the first head gives up, one for each head's fresh token.
    flat = Flat.pack(flat.tokens(), flat.positions() >= 0, held)
    first = np.asarray(flat.owners)[0] == 0
    flat = flat.release(flat.stats["worth"], jnp.asarray([[HEADS, 0, 0]]), most=HEADS)
    assert int(jnp.sum(flat.slots < 0)) == HEADS and first[np.asarray(flat.slots)[0] < 0].all()
    flat = flat.append(token(LENGTH, 1))
    newest = np.asarray(flat.slots)[0] == LENGTH
    np.testing.assert_array_equal(np.asarray(flat.owners)[0][newest], np.arange(HEADS))
    assert newest[first].sum() == HEADS


def test_a_row_that_has_ended_appends_nothing():
    flat, dense = filled()
    same(flat.append(token(LENGTH, 1, present=False)), dense)


def test_statistics_are_written_by_the_owner():
    flat, _ = filled()
    by_head = jnp.broadcast_to(jnp.arange(HEADS, dtype=jnp.float32)[:, None], (1, HEADS, 40))
    marked = flat.with_stats({**flat.stats, "worth": by_head})
    np.testing.assert_array_equal(marked.shared_stats["worth"], marked.owners)
    np.testing.assert_array_equal(marked.shared_stats["kind"], flat.shared_stats["kind"])


def test_bytes_by_slot():
    flat, _ = filled()
    # Key and value, position, owner, and the two statistics.
    slot = 2 * WIDTH * 4 + 4 + 1 + 4 + 1
    assert flat.bytes_read() == 40 * slot + flat.rotary.frequencies.nbytes + flat.rotary.magnitude.nbytes


@pytest.mark.parametrize("total", [64, 1024])
def test_appending_copies_no_keys(total):
    flat, _ = filled(total)
    leaves, structure = jax.tree.flatten(flat)
    fresh, form = jax.tree.flatten(token(LENGTH, 1))

    def step(leaves, fresh):
        return jax.tree.leaves(structure.unflatten(leaves).append(form.unflatten(fresh)))

    text = jax.jit(step, donate_argnums=0).lower(leaves, fresh).compile().as_text()
    assert f"f32[1,{total},{WIDTH}]" in text
    assert f"f32[1,{total},{WIDTH}]{{2,1,0}} copy(" not in text
