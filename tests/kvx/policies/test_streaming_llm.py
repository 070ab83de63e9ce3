"""Claims about StreamingLLM (Xiao et al. 2023): sinks and a window, positions by place, endless constant memory."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.stores.renumbered import Renumbered
from tests.kvx.policies.direct import attend, context, evidence, kept, query, rotary, tokens
from tests.kvx.policies.masked_simulation import kept_by
from tests.tiny import model, prompts


@pytest.mark.parametrize("renumber", [True, False])
def test_sinks_and_the_newest_stay_also_while_decoding(renumber):
    prompt, _ = prompts(10)
    policy = policies.streaming_llm(6, sinks=2, renumber=renumber)
    _, cache = kvx.prefill(model(), prompt, policy, max_new_tokens=8)
    for seen in range(10, 15):
        assert kept_by(cache) == [[[0, 1, *range(seen - 4, seen)]] * 2] * 4
        _, cache = kvx.decode_step(model(), np.asarray([seen]), cache, policy)


def test_short_texts_are_left_alone():
    mask = kept(policies.streaming_llm(9), tokens(2, 7), evidence(7), context(7))
    assert mask.all()


def packed(length, some=None):
    """A store with sinks 0, 1 and the last four of `length` tokens; six raw tokens make up its contents."""
    some = tokens(2, 6, rotated=False) if some is None else some
    positions = np.array([0, 1, *range(length - 4, length)], np.int32)
    some = replace(some, positions=jnp.asarray(np.broadcast_to(positions, (1, 2, 6))))
    return Renumbered.pack(some, jnp.ones((1, 2, 6), bool), 16)


def test_keys_are_rotated_by_place_and_the_next_query_follows():
    store = packed(10)
    np.testing.assert_array_equal(store.places[0, 0, :6], np.arange(6))
    raw = tokens(2, 6, rotated=False)
    fresh = tokens(2, 1, seed=9, rotated=False)
    store = store.append(replace(fresh, positions=jnp.full((1, 2, 1), 10, jnp.int32)))
    asked = query(4, 2, 10)
    found = store.read(asked).out[0, :, :, 0]
    keys = jnp.concatenate([raw.keys, fresh.keys], axis=2)
    values = np.concatenate([raw.values, fresh.values], axis=2)[0]
    turned = np.asarray(rotary(8)(keys, jnp.arange(7)[None, None]))[0]
    queries = np.asarray(rotary(8)(asked.raw, jnp.full((1, 1, 1, 1), 6)))[0, :, :, 0]
    np.testing.assert_allclose(found, attend(queries, turned, values), atol=1e-5)


def test_how_much_was_evicted_does_not_matter():
    near, far = packed(10), packed(100_000)
    outputs = []
    for store, length in ((near, 10), (far, 100_000)):
        fresh = replace(tokens(2, 1, seed=9, rotated=False), positions=jnp.full((1, 2, 1), length, jnp.int32))
        outputs.append(np.asarray(store.append(fresh).read(query(4, 2, length)).out))
    np.testing.assert_array_equal(*outputs)


def test_places_close_up_when_a_slot_is_freed_and_reused():
    store = packed(10)
    scores = jnp.asarray(np.where(np.arange(16) == 2, -1.0, 1.0) * np.ones((1, 2, 1)), jnp.float32)
    store = store.release(scores, jnp.ones((1, 2), jnp.int32))
    fresh = replace(tokens(2, 1, seed=9, rotated=False), positions=jnp.full((1, 2, 1), 10, jnp.int32))
    store = store.append(fresh)
    np.testing.assert_array_equal(store.positions()[0, 0, :6], [0, 1, 10, 7, 8, 9])
    np.testing.assert_array_equal(store.places[0, 0, :6], [0, 1, 5, 2, 3, 4])


def test_until_something_leaves_it_is_the_full_cache():
    prompt, _ = prompts(20)
    streams, whole = policies.streaming_llm(40), policies.full()
    first, second = (kvx.prefill(model(), prompt, policy, max_new_tokens=8) for policy in (streams, whole))
    np.testing.assert_allclose(first[0], second[0], atol=1e-4)
    step = kvx.decode_step(model(), np.asarray([5]), first[1], streams)[0]
    np.testing.assert_allclose(step, kvx.decode_step(model(), np.asarray([5]), second[1], whole)[0], atol=1e-4)


def test_generation_goes_on_far_beyond_the_models_positions_in_constant_memory():
    small = model(max_position_embeddings=128)
    prompt, _ = prompts(40)
    policy = policies.streaming_llm(24)
    _, short = kvx.prefill(small, prompt, policy, max_new_tokens=1)
    result = kvx.generate(small, prompt, policy=policy, max_new_tokens=5000)
    assert result.lengths.tolist() == [5000]
    assert result.cache.nbytes == short.nbytes
    newest = 40 + 4999
    assert kept_by(result.cache) == [[[0, 1, 2, 3, *range(newest - 20, newest)]] * 2] * 4
    assert int(jnp.max(result.cache.layers[0].places)) <= 24
    assert np.isfinite(np.asarray(result.cache.layers[0].dense()[0])).all()
