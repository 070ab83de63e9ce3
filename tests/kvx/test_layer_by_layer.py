"""Claims about decoding layer by layer: the same tokens and caches, one program a kind of layer, nothing taken away."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.generate import _generate
from kvx.layer_by_layer import is_asked, scan, while_loop
from kvx.step import _layer
from tests import tiny

POLICIES = {
    "full": policies.full,
    "evicts by state": lambda: policies.h2o(12),
    "hands a choice up the layers": lambda: policies.tidaldecode(12, layers=(0,)),
    "two layers in one storage": lambda: policies.minicache(start=0.34),
    "layers in one pool": lambda: policies.d2o(16, skip=(0,)),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", POLICIES)
def test_tokens_and_cache_are_those_of_one_program(name):
    model, policy = tiny.model(num_hidden_layers=3), POLICIES[name]()
    tokens, lengths = tiny.prompts(24, 19)
    whole = kvx.generate(model, tokens, policy=policy, lengths=lengths, max_new_tokens=6)
    with kvx.layer_by_layer():
        parts = kvx.generate(model, tokens, policy=policy, lengths=lengths, max_new_tokens=6)
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    np.testing.assert_array_equal(parts.lengths, whole.lengths)
    assert jax.tree.structure(parts.cache) == jax.tree.structure(whole.cache)
    for ours, theirs in zip(jax.tree.leaves(parts.cache), jax.tree.leaves(whole.cache), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_equal_layers_share_one_program_and_the_whole_step_has_none():
    model, (tokens, _) = tiny.model(num_hidden_layers=6), tiny.prompts(20)
    layers, wholes = _layer._cache_size(), _generate._cache_size()
    with kvx.layer_by_layer():
        kvx.generate(model, tokens, policy=policies.tova(11), max_new_tokens=5)
        kvx.generate(model, tokens + 1, policy=policies.tova(11), max_new_tokens=7)
    assert (_layer._cache_size(), _generate._cache_size()) == (layers + 1, wholes)


def test_scores_and_continued_caches_are_the_same_too():
    model, policy, (tokens, _) = tiny.model(), policies.h2o(12), tiny.prompts(30)

    def scored():
        logits, cache = kvx.prefill(model, tokens[:, :18], policy, max_new_tokens=16)
        scores, cache = kvx.teacher_forced(model, tokens[:, 18:22], cache, policy, logits)
        logits, cache = kvx.prefill(model, tokens[:, 22:27], policy, cache=cache)
        after, _ = kvx.decode_step(model, tokens[:, 27], cache, policy)
        return scores, logits, after

    expected = scored()
    with kvx.layer_by_layer():
        found = scored()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_a_fork_shares_stays_with_the_cache_it_came_from():
    model, policy, (tokens, _) = tiny.model(), policies.paged(), tiny.prompts(20)
    start = kvx.prefill(model, tokens, policy, max_new_tokens=8)
    with kvx.layer_by_layer():
        forked = kvx.generate(model, tokens, policy=policy, start=kvx.fork(start, 2), max_new_tokens=4)
        alone = kvx.generate(model, tokens, policy=policy, start=start, max_new_tokens=4)
    np.testing.assert_array_equal(forked.tokens, np.repeat(alone.tokens, 2, axis=0))


def test_it_holds_inside_the_block_and_in_its_thread_alone():
    found = []
    with kvx.layer_by_layer():
        other = threading.Thread(target=lambda: found.append(is_asked()))
        other.start()
        other.join()
        assert is_asked() and found == [False]
    assert not is_asked()
    with pytest.raises(ZeroDivisionError), kvx.layer_by_layer():
        1 / 0  # noqa: B018
    assert not is_asked()


def test_loops_of_the_host_are_those_of_a_program():
    def advance(carry, row):
        return carry + row["x"], (carry, row["x"] * 2)

    rows = {"x": jnp.arange(1.0, 5.0)}
    for ours, theirs in zip(scan(advance, 0.5, rows), jax.jit(lambda: scan(advance, 0.5, rows))(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    def count(start):
        return while_loop(lambda state: state[0] < 7, lambda state: (state[0] + 2, state[1] * 3), (start, start + 1))

    assert [int(each) for each in count(jnp.int32(1))] == [int(each) for each in jax.jit(count)(jnp.int32(1))]
