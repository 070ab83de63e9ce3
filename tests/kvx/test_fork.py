"""Forking caches: every copy goes on as its row would have, shared pages stay whose they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.stores.forked import Forked
from tests import tiny

STEPS = 12
PAGED = kvx.policies.paged()


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=2)


def arrays(cache) -> list[np.ndarray]:
    return [np.asarray(leaf).copy() for leaf in jax.tree.leaves(cache)]


POLICIES = (
    "paged",
    "snapkv(budget=32, window=8)+paged(page=8)",
    "snapkv(budget=32, window=8)",
    "h2o(budget=32)",
    "d2o(budget=32, skip=(0,))",
    "kivi(bits=4, group=16, residual=16)",
    "shadowkv(budget=16, rank=24, chunk=4, outliers=2, local=1)",
)
"""Stores that share, and one of every kind that repeats: slots, counters, pools, codes, values on the host."""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("text", POLICIES)
def test_every_copy_goes_on_as_its_row_alone_would(model, text):
    """A forked cache of 2 rows under 6 continuations equals 6 prompts; also under a fork of the fork."""
    policy = kvx.parse_policy(text)
    tokens, lengths = tiny.prompts(90, 50)
    text = np.random.default_rng(1).integers(0, 97, (6, STEPS)).astype(np.int32)
    again = np.random.default_rng(2).integers(0, 97, (12, STEPS)).astype(np.int32)
    scores = []
    for start in (
        kvx.fork(kvx.prefill(model, tokens, policy, lengths, max_new_tokens=2 * STEPS), 3),
        kvx.prefill(model, np.repeat(tokens, 3, 0), policy, np.repeat(lengths, 3), max_new_tokens=2 * STEPS),
    ):
        first, cache = kvx.teacher_forced(model, text, start[1], policy, start[0])
        if len(scores) == 0:
            cache, then = kvx.fork(cache, 2), again
        else:
            then = again[::2]
        second, cache = kvx.teacher_forced(model, then, cache, policy, jnp.zeros((len(then), 97)))
        scores.append((np.asarray(first), np.asarray(second)))
        held = np.asarray(cache.next)
    np.testing.assert_allclose(scores[0][0], scores[1][0], atol=1e-4)
    np.testing.assert_allclose(scores[0][1][::2], scores[1][1], atol=1e-4)
    assert held.tolist() == (np.repeat(lengths, 3) + 2 * STEPS).tolist()


def test_several_samples_of_one_prompt_equal_as_many_prompts(model):
    tokens, lengths = tiny.prompts(60, 33)
    rule = kvx.sampling(temperature=0.9, top_k=20, repetition_penalty=1.1)
    asked = {"lengths": lengths, "max_new_tokens": STEPS, "sampling": rule, "seed": range(8), "policy": PAGED}
    start = kvx.prefill(model, tokens, PAGED, lengths, max_new_tokens=STEPS)
    found = kvx.generate(model, tokens, start=kvx.fork(start, 4), **asked)
    whole = asked | {"lengths": np.repeat(lengths, 4), "policy": None}
    wanted = kvx.generate(model, np.repeat(tokens, 4, 0), **whole)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert len(np.unique(np.asarray(found.tokens)[:4], axis=0)) == 4, "four different texts"
    streamed = list(kvx.stream(model, tokens, start=kvx.fork(start, 4), **asked))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), found.tokens)


def test_generation_starts_from_a_prefill_that_was_not_forked_too(model):
    tokens, lengths = tiny.prompts(60, 33)
    for text in ("full", "h2o(budget=24)"):
        policy = kvx.parse_policy(text)
        start = kvx.prefill(model, tokens, policy, lengths, max_new_tokens=STEPS)
        found = kvx.generate(model, tokens, policy=policy, lengths=lengths, start=start, max_new_tokens=STEPS)
        wanted = kvx.generate(model, tokens, policy=policy, lengths=lengths, max_new_tokens=STEPS)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)


def test_a_forked_cache_takes_another_turn(model):
    """Each copy gets its own question."""
    tokens, lengths = tiny.prompts(60, 33)
    questions = tiny.prompts(9, 9, 9, 9, seed=5)[0]
    _, cache = kvx.prefill(model, tokens, PAGED, lengths, max_new_tokens=40)
    found = kvx.generate(model, questions, policy=PAGED, cache=kvx.fork(cache, 2), max_new_tokens=6)
    full = kvx.policies.full()
    _, copied = kvx.prefill(model, np.repeat(tokens, 2, 0), full, np.repeat(lengths, 2), max_new_tokens=40)
    wanted = kvx.generate(model, questions, policy=full, cache=copied, max_new_tokens=6)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)


@pytest.mark.sampled
@pytest.mark.parametrize("text", ["paged", "h2o(budget=32)", "shadowkv(budget=16, rank=8, chunk=4, outliers=2)"])
def test_the_cache_that_was_forked_stays_usable_and_as_it_was(model, text):
    """Its fork is donated to every step; what both hold is not."""
    policy = kvx.parse_policy(text)
    tokens, lengths = tiny.prompts(90, 50)
    _, cache = kvx.prefill(model, tokens, policy, lengths, max_new_tokens=STEPS)
    before = arrays(cache)
    for copies in (1, 3):
        fork = kvx.fork(cache, copies)
        _, fork = kvx.decode_step(model, np.zeros(2 * copies, np.int32), fork, policy)
        _, fork = kvx.decode_step(model, np.ones(2 * copies, np.int32), fork, policy)
        for leaf, was in zip(jax.tree.leaves(cache), before, strict=True):
            np.testing.assert_array_equal(leaf, was)


def test_shared_pages_are_the_parents_own_through_every_step(model):
    tokens, lengths = tiny.prompts(90, 50)
    start = kvx.prefill(model, tokens, PAGED, lengths, max_new_tokens=STEPS)
    cache = start[1]
    where = [store.keys.unsafe_buffer_pointer() for store in cache.layers]
    fork = kvx.fork(cache, 3)
    assert all(isinstance(store, Forked) for store in fork.layers)
    # 2 rows x 2 heads x 3 copies of 128 slots and 8 table entries; each row's next position.
    own = 2 * (12 * 128 * (2 * 32 * 4 + 4) + 12 * (8 + 1) * 4 + 16 * 4 + 4) + 4 * 4
    assert fork.nbytes == cache.nbytes + own
    assert fork.bytes_read() < cache.bytes_read() * 1.1, "a shared level is read once for its three rows"
    result = kvx.generate(model, tokens, policy=PAGED, start=kvx.fork(start, 3), max_new_tokens=STEPS)
    shared = [store.levels[0].store.keys.unsafe_buffer_pointer() for store in result.cache.layers]
    assert shared == where


def test_forks_compile_once_for_all_prompts_of_a_bucket(model):
    """A bucket of pages: the pool is as large as the rows need, rounded up."""
    from kvx.generate import _generate

    for seed, length in ((0, 60), (1, 71), (2, 64)):
        tokens, lengths = tiny.prompts(length, 40, seed=seed)
        start = kvx.fork(kvx.prefill(model, tokens, PAGED, lengths, max_new_tokens=STEPS), 2)
        kvx.generate(model, tokens, policy=PAGED, start=start, max_new_tokens=STEPS)
        if seed == 0:
            programs = _generate._cache_size()
    assert _generate._cache_size() == programs


def test_bad_forks_and_starts_are_refused_in_a_sentence(model):
    tokens, lengths = tiny.prompts(60, 33)
    start = kvx.prefill(model, tokens, PAGED, lengths, max_new_tokens=STEPS)
    with pytest.raises(kvx.BadInput, match="copies=0 is out of range"):
        kvx.fork(start, 0)
    with pytest.raises(kvx.BadInput, match="start is of type str; allowed: a cache"):
        kvx.fork("cache", 2)
    with pytest.raises(kvx.BadInput, match="start has logits of 4 rows and a cache of 4, for tokens of 3"):
        kvx.generate(model, np.zeros((3, 4), np.int32), policy=PAGED, start=kvx.fork(start, 2))
    with pytest.raises(kvx.BadInput, match="tokens has 2 rows, the cache 4; allowed: one for each of its rows"):
        kvx.generate(model, tokens, policy=PAGED, cache=kvx.fork(start[1], 2))
    with pytest.raises(kvx.BadInput, match="tokens has 2 rows, the cache 4"):
        kvx.prefill(model, tokens, PAGED, None, kvx.fork(start[1], 2))
    with pytest.raises(kvx.BadInput, match="start and cache are both given"):
        kvx.generate(model, tokens, policy=PAGED, start=start, cache=start[1])
    with pytest.raises(kvx.BadInput, match="prefill_chunk: given with start"):
        kvx.generate(model, tokens, policy=PAGED, start=start, prefill_chunk=8)
    with pytest.raises(kvx.BadInput, match="cache has room for 128 more tokens, 499 are needed"):
        kvx.generate(model, tokens, policy=PAGED, start=start, max_new_tokens=500)


def test_pages_save_bytes_where_rows_differ_in_length(model):
    """One row of 1000 tokens and three short ones: dense slots are as many for each, pages are not."""
    tokens, lengths = tiny.prompts(1000, 20, 20, 20)
    _, dense = kvx.prefill(model, tokens, kvx.policies.full(), lengths, max_new_tokens=STEPS)
    _, pages = kvx.prefill(model, tokens, PAGED, lengths, max_new_tokens=STEPS)
    (store, *_) = pages.layers
    # 71 pages of 16 for 1000 tokens and 128 to come, 10 for each of the others; rounded up for few compiled programs.
    assert np.asarray(store.table >= 0).sum(axis=-1).tolist() == [[71, 71], [10, 10], [10, 10], [10, 10]]
    assert 202 <= len(store.keys) <= 1.15 * 202 and dense.layers[0].keys.shape[2] == 1152
    assert pages.nbytes < 0.5 * dense.nbytes
    assert store.bytes_read() < dense.layers[0].bytes_read() / 3
