"""Claims about edits (PIE, He et al. 2024): what is exact, what is approximate, several at once, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.stores.dense import Dense
from tests import tiny
from tests.kvx.stores.one_layer import tokens

FULL = policies.full()
TEXT, _ = tiny.prompts(40, 40)
NEW = np.asarray([3, 14, 15, 92, 6], np.int32)


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=3)


@pytest.fixture(scope="module")
def shallow():
    """With one layer, keys and values depend on their token alone: PIE is exact."""
    return tiny.model(num_hidden_layers=1)


def cached(model, text, policy=FULL, **options):
    return kvx.prefill(model, text, policy, max_new_tokens=64, **options)


def edited(text, edits):
    """The new text of every row, for edits that are the same in all rows."""
    rows = []
    for row in text.tolist():
        for start, stop, new in reversed(edits):
            row[start:stop] = list(new)
        rows.append(row)
    return np.asarray(rows, np.int32)


def contents(cache):
    """Every layer's keys, values by position: (layer, B, G, n, D), in order."""
    found = []
    for store in cache.layers:
        keys, values, positions = map(np.asarray, store.dense())
        order = np.argsort(np.where(positions < 0, 10**6, positions), axis=-1)[..., : (positions[0, 0] >= 0).sum()]
        picked = np.take_along_axis(positions, order, axis=-1)
        assert (picked == np.arange(order.shape[-1])).all(), "every position once"
        found.append([np.take_along_axis(array, order[..., None], axis=2) for array in (keys, values)])
    return np.asarray(found)


EDITS = {
    "insertion": [(10, 10, NEW)],
    "deletion": [(10, 17, [])],
    "longer": [(10, 12, NEW)],
    "shorter": [(10, 19, NEW)],
    "same length": [(10, 15, NEW)],
    "first token": [(0, 1, NEW)],
    "more than a run": [(10, 12, np.arange(40))],
    "several": [(2, 4, [7]), (9, 9, NEW), (20, 30, []), (33, 35, [1, 2, 3])],
}


@pytest.mark.parametrize("name", EDITS)
def test_in_one_layer_an_edited_cache_is_that_of_the_new_text(shallow, name):
    edits, text = EDITS[name], edited(TEXT, EDITS[name])
    _, cache = cached(shallow, TEXT)
    logits, cache = kvx.edit(shallow, cache, FULL, edits, tail=TEXT[:, -1])
    wanted, fresh = cached(shallow, text)
    assert cache.next.tolist() == [text.shape[1]] * 2
    # Rotated twice in float32 instead of once.
    np.testing.assert_allclose(contents(cache), contents(fresh), atol=1e-5)
    np.testing.assert_allclose(logits, wanted, atol=2e-5)
    more = kvx.generate(shallow, TEXT[:, :3], policy=FULL, cache=cache, max_new_tokens=6)
    same = kvx.generate(shallow, TEXT[:, :3], policy=FULL, cache=fresh, max_new_tokens=6)
    np.testing.assert_array_equal(more.tokens, same.tokens)


@pytest.mark.parametrize("name", EDITS)
def test_prefix_new_span_and_first_layer_are_exact_in_deep_models(model, name):
    start, _, new = EDITS[name][0]
    _, cache = cached(model, TEXT)
    before = contents(cache)
    _, cache = kvx.edit(model, cache, FULL, EDITS[name])
    _, fresh = cached(model, edited(TEXT, EDITS[name]))
    after, wanted = contents(cache), contents(fresh)
    np.testing.assert_array_equal(after[..., :start, :], before[..., :start, :])
    span = slice(start, start + len(new))
    np.testing.assert_allclose(after[..., span, :], wanted[..., span, :], atol=2e-5)
    np.testing.assert_allclose(after[0], wanted[0], atol=1e-5)
    # Values that follow are the old ones, whatever the edits: the approximation.
    follow = 40 - EDITS[name][-1][1]
    np.testing.assert_array_equal(after[:, 1, :, :, -follow:], before[:, 1, :, :, -follow:])
    assert np.abs(after[1:, 1, :, :, -follow:] - wanted[1:, 1, :, :, -follow:]).max() > 1e-3


def test_distances_are_those_of_the_new_text(model):
    """Scores between two later tokens stay; against the first token they are those of the new distance."""
    _, cache = cached(model, TEXT)
    keys = contents(cache)[:, 0]
    _, cache = kvx.edit(model, cache, FULL, [(10, 12, NEW)])
    moved, rotary = contents(cache)[:, 0], model.blocks[0].rotary
    np.testing.assert_allclose(
        np.einsum("lbgsd,lbgtd->lbgst", moved[..., 15:, :], moved[..., 15:, :]),
        np.einsum("lbgsd,lbgtd->lbgst", keys[..., 12:, :], keys[..., 12:, :]),
        atol=1e-4,
    )
    further = rotary.onwards(jnp.asarray(keys[..., 12:, :]), jnp.full(keys[..., 12:, 0].shape, 3))
    np.testing.assert_allclose(
        np.einsum("lbgsd,lbgd->lbgs", moved[..., 15:, :], moved[..., 0, :]),
        np.einsum("lbgsd,lbgd->lbgs", further, keys[..., 0, :]),
        atol=1e-4,
    )


def test_a_span_of_the_same_length_leaves_what_follows_bit_by_bit(model):
    _, cache = cached(model, TEXT, cache_dtype=jnp.bfloat16)
    before = contents(cache)
    _, cache = kvx.edit(model, cache, FULL, [(10, 15, NEW)])
    np.testing.assert_array_equal(contents(cache)[..., 15:, :], before[..., 15:, :])


def test_a_new_whole_text_is_its_prefill(model):
    _, cache = cached(model, TEXT)
    text = np.random.default_rng(5).integers(0, 97, (2, 33)).astype(np.int32)
    logits, cache = kvx.edit(model, cache, FULL, [(0, 40, text)])
    wanted, fresh = cached(model, text)
    np.testing.assert_allclose(logits, wanted, atol=2e-5)
    np.testing.assert_allclose(contents(cache), contents(fresh), atol=2e-5)


def test_an_insertion_at_the_end_appends_and_a_deletion_there_crops(model):
    _, cache = cached(model, TEXT)
    logits, cache = kvx.edit(model, cache, FULL, [(40, 40, NEW)])
    _, appended = cached(model, TEXT)
    wanted, appended = kvx.prefill(model, np.tile(NEW, (2, 1)), FULL, cache=appended)
    np.testing.assert_allclose(logits, wanted, atol=2e-5)
    np.testing.assert_allclose(contents(cache), contents(appended), atol=2e-5)
    nothing, cache = kvx.edit(model, cache, FULL, [(30, 45, [])])
    _, short = cached(model, TEXT[:, :30])
    assert nothing is None and cache.next.tolist() == [30, 30]
    np.testing.assert_allclose(contents(cache), contents(short), atol=2e-5)


def test_an_insertion_that_is_deleted_again_restores_the_cache(model):
    _, cache = cached(model, TEXT)
    before, room = contents(cache), int(cache.room)
    _, cache = kvx.edit(model, cache, FULL, [(10, 10, NEW)])
    _, cache = kvx.edit(model, cache, FULL, [(10, 15, [])])
    np.testing.assert_allclose(contents(cache), before, atol=1e-5)
    assert int(cache.room) >= room


def test_several_edits_at_once_are_those_edits_one_by_one(model):
    """Left to right, each in the text as it then stands."""
    _, cache = cached(model, TEXT)
    logits, cache = kvx.edit(model, cache, FULL, EDITS["several"], tail=TEXT[:, -1])
    _, single = cached(model, TEXT)
    for edit in ((2, 4, [7]), (8, 8, NEW), (24, 34, [])):
        _, single = kvx.edit(model, single, FULL, [edit])
    wanted, single = kvx.edit(model, single, FULL, [(27, 29, [1, 2, 3])], tail=TEXT[:, -1])
    np.testing.assert_allclose(contents(cache), contents(single), atol=2e-5)
    np.testing.assert_allclose(logits, wanted, atol=2e-5)


def test_every_key_is_rotated_once_however_many_edits_there_are(shallow):
    """In bfloat16 each rotation rounds: ten insertions in one call round once, in ten calls ten times."""
    edits = [(place, place, [1]) for place in range(0, 30, 3)]
    _, fresh = cached(shallow, edited(TEXT, edits))
    errors = []
    for calls in ([edits], [[(4 * turn, 4 * turn, [1])] for turn in range(10)]):
        _, cache = cached(shallow, TEXT, cache_dtype=jnp.bfloat16)
        for some in calls:
            _, cache = kvx.edit(shallow, cache, FULL, some)
        errors.append(np.abs(contents(cache).astype(np.float32) - contents(fresh))[:, 0, :, :, 40:].mean())
    assert errors[0] < 0.7 * errors[1]


def test_reading_the_whole_tail_again_is_the_prefill_of_the_new_text(model):
    _, cache = cached(model, TEXT)
    logits, cache = kvx.edit(model, cache, FULL, [(10, 12, NEW)], tail=TEXT[:, 12:])
    wanted, fresh = cached(model, edited(TEXT, [(10, 12, NEW)]))
    np.testing.assert_allclose(logits, wanted, atol=2e-5)
    np.testing.assert_allclose(contents(cache), contents(fresh), atol=2e-5)


def test_a_longer_tail_comes_closer(model):
    wanted, _ = cached(model, edited(TEXT, [(10, 12, NEW)]))
    errors = []
    for width in (1, 20, 28):
        _, cache = cached(model, TEXT)
        logits, _ = kvx.edit(model, cache, FULL, [(10, 12, NEW)], tail=TEXT[:, -width:])
        errors.append(float(np.abs(logits - wanted).max()))
    assert errors[0] > errors[1] > errors[2]


def test_rows_are_edited_each_at_its_own_place(model):
    """A ragged batch, other spans and other tokens in each row."""
    text, lengths = tiny.prompts(40, 25)
    start, stop = np.asarray([10, 3]), np.asarray([12, 9])
    new, last = np.stack([NEW, NEW[::-1]]), np.asarray([text[0, 39], text[1, 24]])
    _, cache = cached(model, text, lengths=lengths)
    logits, cache = kvx.edit(model, cache, FULL, [(start, stop, new)], tail=last)
    assert cache.next.tolist() == [43, 24]
    for row, length in enumerate(lengths):
        _, alone = cached(model, text[row : row + 1, :length])
        one = [(int(start[row]), int(stop[row]), new[row])]
        wanted, alone = kvx.edit(model, alone, FULL, one, tail=last[row : row + 1])
        np.testing.assert_allclose(logits[row], wanted[0], atol=2e-5)
        for store, single in zip(cache.layers, alone.layers, strict=True):
            held, own = (np.sort(np.asarray(each.positions()), axis=-1) for each in (store, single))
            np.testing.assert_array_equal(held[row][held[row] >= 0], own[0][own[0] >= 0])


def test_a_cache_of_selected_tokens_is_edited_where_they_are(model):
    policy = policies.snapkv(24, window=8)
    _, cache = cached(model, TEXT, policy)
    held = [np.asarray(store.positions()) for store in cache.layers]
    logits, cache = kvx.edit(model, cache, policy, [(10, 12, NEW)], tail=TEXT[:, -1])
    assert np.isfinite(np.asarray(logits)).all()
    for before, store in zip(held, cache.layers, strict=True):
        for old, now in zip(before.reshape(4, -1), np.asarray(store.positions()).reshape(4, -1), strict=True):
            wanted = {*old[(old >= 0) & (old < 10)], *range(10, 15), *(old[old >= 12] + 3)}
            assert sorted(now[now >= 0]) == sorted(wanted)


def test_room_is_what_is_free_and_edits_may_use_all_of_it(model):
    _, cache = cached(model, TEXT)
    _, cache = kvx.edit(model, cache, FULL, [(10, 12, NEW)])
    free = min(int((np.asarray(store.positions()) < 0).sum(axis=-1).min()) for store in cache.layers)
    assert int(cache.room) == free
    _, cache = kvx.edit(model, cache, FULL, [(5, 5, np.ones(free, np.int32))])
    assert int(cache.room) == 0 and cache.next.tolist() == [43 + free] * 2
    with pytest.raises(kvx.BadInput, match="cache has 0 free slots, edits bring 1 tokens"):
        kvx.edit(model, cache, FULL, [(5, 5, [1])])
    _, cache = kvx.edit(model, cache, FULL, [(5, 8, [1])])
    assert int(cache.room) == 2


def test_edits_of_other_sizes_and_places_share_their_programs(model):
    from kvx.edit import _move, _run

    _, cache = cached(model, TEXT)
    _, cache = kvx.edit(model, cache, FULL, [(10, 12, NEW)])
    before = (_move._cache_size(), _run._cache_size())
    _, cache = kvx.edit(model, cache, FULL, [(3, 20, np.arange(30))])
    assert (_move._cache_size(), _run._cache_size()) == before


def test_unrotated_keys_stay_and_only_their_positions_change():
    held = tokens([[0, 1, 2, 3, -1]]).with_form(rotated=False)
    store = Dense(held.keys, held.values, held.positions, held.rotary, rotated=False)
    positions = jnp.where(store.slots >= 2, store.slots + 7, store.slots)
    moved = store.move(positions)
    np.testing.assert_array_equal(moved.keys, store.keys)
    np.testing.assert_array_equal(moved.slots, [[[0, 1, 9, 10, -1]] * 2])
    rotated = Dense(held.rotated_keys, held.values, held.positions, held.rotary).move(positions)
    np.testing.assert_allclose(moved.dense()[0], rotated.dense()[0], atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "policy",
    [
        policies.h2o(32),
        policies.streaming_llm(32),
        policies.kivi(bits=4, group=16, residual=16),
        policies.ape(),
        policies.pyramidinfer(),
    ],
)
def test_policies_that_act_while_decoding_or_store_otherwise_are_refused(model, policy):
    _, cache = cached(model, TEXT, policy)
    with pytest.raises(kvx.BadInput, match="keeps tokens where they cannot be moved"):
        kvx.edit(model, cache, policy, [(10, 12, NEW)])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("edits", "tail", "words"),
    [
        ([(10, 9, NEW)], None, r"edit 0 spans \[10, 10\] to \[9, 9\]"),
        ([(10, 41, NEW)], None, r"to the end of the text, \[40, 40\]"),
        ([(-1, 4, NEW)], None, "edit 0 spans"),
        ([(10, 14, NEW), (12, 20, [])], None, r"edit 1 spans .* from the end of the edit before it, \[14, 14\]"),
        ([(10.0, 14, NEW)], None, "allowed: integers, or one for each row"),
        ([(np.asarray([1, 2, 3]), 14, NEW)], None, "allowed: integers, or one for each row"),
        ([(10, 14, [97])], None, "edit 0 holds .*allowed: 0 to 96"),
        ([(10, 14, np.ones((3, 2), np.int32))], None, r"edit 0 has tokens of shape \(3, 2\)"),
        ([(10, 14, [1.5])], None, "float64; allowed: integers of each row"),
        ([(10, 38, NEW)], TEXT[:, -3:], "tail has 3 tokens, but 2 follow the last edit"),
        ([(10, 14, NEW)], TEXT[0, -3:], "tail has tokens of shape"),
        ([(10, 10, np.ones(5000, np.int32))], None, "edits make a text of 5040 tokens; allowed: 4096"),
    ],
)
def test_edits_that_cannot_be_are_refused_and_the_cache_lives_on(model, edits, tail, words):
    _, cache = cached(model, TEXT)
    with pytest.raises(kvx.BadInput, match=words):
        kvx.edit(model, cache, FULL, edits, tail)
    kvx.decode_step(model, TEXT[:, 0], cache, FULL)
