"""Claims about operations: XLA counts the same for a dense causal model, and thinned layers cost less."""

import jax
import jax.numpy as jnp
import pytest

import kvx
from kvx.eval.plan.abstract import shapes
from kvx.eval.plan.arithmetic import prompt_operations, token_operations
from kvx.generate import full_policy
from kvx.models.build import abstract_model
from kvx.policies import pyramidinfer
from tests.tiny import CONFIG

SMOLLM = {
    **CONFIG,
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
"""SmolLM2-135M with three of its thirty equal layers."""


def _dense(model, tokens):
    """Logits after the last token, with every query's logits over every key."""
    x = model.embed(tokens)
    causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    for block in model.blocks:
        q, k, v = block.project(x)
        group = block.spec.group
        logits = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, group, axis=2))
        weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
        x = block.finish(x, jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, group, axis=2)))
    return model.unembed(x[:, -1])


@pytest.mark.parametrize("length", [512, 1024])
def test_xla_counts_the_same_for_a_dense_model(length):
    model = shapes(abstract_model(SMOLLM, jnp.float32))
    found = jax.jit(_dense).lower(model, jax.ShapeDtypeStruct((1, length), jnp.int32)).cost_analysis()
    ours = prompt_operations(model, full_policy(), length, length)
    # The dense model computes both halves of the square; a causal one needs one of them.
    upper = sum(block.spec.heads * 2 * block.spec.key_dim * length**2 for block in model.blocks)
    # Norms, softmax and activations, which are not products, are within this.
    assert ours + upper == pytest.approx(found["flops"], rel=0.05)


def test_xla_counts_the_same_for_one_token_without_its_attention():
    model = shapes(abstract_model(SMOLLM, jnp.float32))

    def products(model, token):
        x = model.embed(token)
        for block in model.blocks:
            q, _, _ = block.project(x)
            x = block.finish(x, q)
        return model.unembed(x[:, -1])

    found = jax.jit(products).lower(model, jax.ShapeDtypeStruct((1, 1), jnp.int32)).cost_analysis()
    assert token_operations(model) == pytest.approx(found["flops"], rel=0.05)


def test_a_tied_table_is_multiplied_once():
    tied, untied = (
        shapes(abstract_model({**SMOLLM, "tie_word_embeddings": each}, jnp.float32)) for each in (True, False)
    )
    assert token_operations(tied) == token_operations(untied)


def test_what_does_not_go_on_costs_nothing_further_up():
    model = shapes(abstract_model(CONFIG, jnp.float32))
    whole = prompt_operations(model, full_policy(), 256, 256)
    assert prompt_operations(model, pyramidinfer(0.5), 256, 256) < whole
    assert prompt_operations(model, kvx.parse_policy("snapkv(budget=64, window=8)"), 256, 256) == whole
