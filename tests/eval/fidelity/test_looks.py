"""Claims about looks: a step under observation is the same step, and what is seen is what attention saw."""

import jax
import jax.numpy as jnp
import numpy as np

import kvx
from kvx.policies import full, h2o
from kvx.pytree import pytree
from kvx.step import observed_run
from tests import tiny, tiny_latent


@pytree
class Positions:
    """The slots' positions."""

    def at(self, layer):
        return self

    def __call__(self, store, query, out):
        return store.positions()


@pytree
class Outputs:
    """Attention over the store that was seen, and the layer's."""

    def at(self, layer):
        return self

    def __call__(self, store, query, out):
        return store.read(query).out, out


observed = jax.jit(observed_run)


def test_observation_changes_nothing():
    model, policy = tiny.model(num_hidden_layers=3), h2o(12)
    tokens, _ = tiny.prompts(24, 24)
    _, cache = kvx.prefill(model, tokens[:, :20], policy, max_new_tokens=8)
    seen, expected = cache, jax.tree.map(jnp.copy, cache)
    for place in range(20, 23):
        token = jnp.asarray(tokens[:, place : place + 1])
        logits, seen, _ = observed(model, token, seen, policy, jnp.ones(token.shape, bool), Positions())
        wanted, expected = kvx.decode_step(model, tokens[:, place], expected, policy)
        np.testing.assert_allclose(logits[:, 0], wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(seen), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_store_is_seen_with_the_new_token_and_before_one_leaves():
    model, policy = tiny.model(num_hidden_layers=2), h2o(12)
    tokens, _ = tiny.prompts(24)
    _, cache = kvx.prefill(model, tokens[:, :20], policy, max_new_tokens=8)

    token = jnp.asarray(tokens[:, 20:21])
    _, after, looks = observed(model, token, cache, policy, jnp.ones(token.shape, bool), Positions())
    for seen, store in zip(looks, after.layers, strict=True):
        held = [set(np.asarray(each)[0, 0].tolist()) - {-1} for each in (seen, store.positions())]
        assert 20 in held[0] and len(held[0]) == 13 and len(held[1]) == 12 and held[1] < held[0]


def test_what_is_seen_explains_the_output():
    """Softmax over the store that was seen is the layer's attention output; of latent attention too."""
    for model in (tiny.model(num_hidden_layers=2), tiny_latent.model()):
        tokens, _ = tiny.prompts(20)
        _, cache = kvx.prefill(model, tokens[:, :18], full(), max_new_tokens=8)

        token = jnp.asarray(tokens[:, 18:19])
        _, _, looks = observed(model, token, cache, full(), jnp.ones(token.shape, bool), Outputs())
        for expected, out in looks:
            np.testing.assert_allclose(out, expected, rtol=1e-6)
