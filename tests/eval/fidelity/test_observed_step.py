"""Claims about the observed step: it is the spine's step, and what it sees is what attention saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.eval.fidelity.observed_step import observed_step
from kvx.policies import full, h2o, kivi, minicache, streaming_llm, tidaldecode
from tests import tiny, tiny_latent

POLICIES = {
    "full": full,
    "evicts": lambda: h2o(12),
    "renumbers": lambda: streaming_llm(12),
    "hands a choice up the layers": lambda: tidaldecode(12, layers=(0,)),
    "two layers in one storage": lambda: minicache(start=0.34),
    "packed codes": lambda: kivi(bits=4, group=16, residual=16),
}


# Those that take long to compile.
SLOW = ("packed codes", "two layers in one storage", "renumbers")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in POLICIES]
)
def test_logits_and_cache_are_those_of_a_decode_step(name):
    model, policy = tiny.model(num_hidden_layers=3), POLICIES[name]()
    tokens, _ = tiny.prompts(24, 24)
    _, cache = kvx.prefill(model, tokens[:, :20], policy, max_new_tokens=8)
    step = jax.jit(lambda token, cache: observed_step(model, token, cache, policy, lambda *seen: None)[:2])
    seen, expected = cache, jax.tree.map(jnp.copy, cache)
    for place in range(20, 23):
        logits, seen = step(jnp.asarray(tokens[:, place]), seen)
        wanted, expected = kvx.decode_step(model, tokens[:, place], expected, policy)
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(seen) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(seen), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(ours.dtype, jnp.integer):
            np.testing.assert_array_equal(ours, theirs)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_store_is_seen_with_the_new_token_and_before_one_leaves():
    model, policy = tiny.model(num_hidden_layers=2), h2o(12)
    tokens, _ = tiny.prompts(24)
    _, cache = kvx.prefill(model, tokens[:, :20], policy, max_new_tokens=8)

    def look(index, store, query, out):
        return store.positions()

    _, after, looks = jax.jit(lambda token, cache: observed_step(model, token, cache, policy, look))(
        jnp.asarray(tokens[:, 20]), cache
    )
    for seen, store in zip(looks, after.layers, strict=True):
        held = [set(np.asarray(each)[0, 0].tolist()) - {-1} for each in (seen, store.positions())]
        assert 20 in held[0] and len(held[0]) == 13 and len(held[1]) == 12 and held[1] < held[0]


def test_what_is_seen_explains_the_output():
    """Softmax over the store that was seen is the layer's attention output; of latent attention too."""
    for model in (tiny.model(num_hidden_layers=2), tiny_latent.model()):
        tokens, _ = tiny.prompts(20)
        _, cache = kvx.prefill(model, tokens[:, :18], full(), max_new_tokens=8)

        def look(index, store, query, out):
            return store.read(query).out, out

        looks = jax.jit(lambda token, cache: observed_step(model, token, cache, full(), look)[2])(  # noqa: B023
            jnp.asarray(tokens[:, 18]), cache
        )
        for expected, out in looks:
            np.testing.assert_allclose(out, expected, rtol=1e-6)
