"""Claims about fewer KV heads: exact where heads agree, and principal components never err more than means."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.train.convert.fewer_heads import _principal
from kvx.train.convert.recipes import gqa
from kvx.train.convert.source import Source, as_channels, read_source
from tests.train.convert import layers
from tests.train.convert.dense import output, source_logits

MULTI = "llama-multi-head"
CLOSE = 1e-4
"""float32 logits of size 1 after two layers whose matrices were multiplied out anew."""


def logits(model) -> np.ndarray:
    return np.asarray(model(jnp.asarray(layers.texts(2, 12))))


@pytest.mark.parametrize("pooling", ["mean", "svd"])
@pytest.mark.parametrize("name", ["llama-biases", pytest.param(MULTI, marks=pytest.mark.slow)])
def test_as_many_heads_is_the_same_model(name, pooling):
    model, moments = layers.model(name), layers.moments(name)
    converted, report = gqa(model.blocks[0].spec.kv_heads, pooling)(model, moments)
    np.testing.assert_allclose(logits(converted), logits(model), atol=CLOSE)
    assert report.after == report.before and report.layers[0].kept == pytest.approx(1)


@pytest.mark.parametrize("pooling", ["mean", "svd"])
def test_equal_heads_are_pooled_without_loss(pooling):
    model = layers.model(MULTI, rope_theta=5000.0)
    for block in model.blocks:
        kernel = np.asarray(block.attention.qkv.kernel[...]).copy()
        kernel[:, 1, 1:], kernel[:, 3, 1:] = kernel[:, 0, 1:], kernel[:, 2, 1:]
        block.attention.qkv.kernel.set_value(jnp.asarray(kernel))
    converted, report = gqa(2, pooling)(model, layers.moments(MULTI))
    assert converted.blocks[0].spec.kv_heads == 2 and 2 * report.after == report.before
    assert json.loads(converted.source)["num_key_value_heads"] == 2
    np.testing.assert_allclose(logits(converted), logits(model), atol=CLOSE)


def test_heads_that_differ_by_a_phase_per_frequency_are_pooled_without_loss():
    """Where means cancel: keys of the second head are those of the first, turned; its values a linear map of theirs."""
    source, random = layers.source(MULTI), np.random.default_rng(0)
    key, value = source.key_pairs.copy(), source.value.copy()
    for head in (0, 2):
        phases = np.exp(1j * random.uniform(0, 6, key.shape[1]))
        key[head + 1] = (2 * phases)[:, None] * key[head]
        value[head + 1] = random.standard_normal((16, 16)) @ value[head]
    related = Source(**{**vars(source), "key": as_channels(key), "value": value})
    x = layers.inputs(MULTI)
    pooled, kept = _principal(related, 2, layers.moments(MULTI)[1].inputs)
    assert kept == pytest.approx(1)
    expected = output(related, source_logits(related, x), x)
    np.testing.assert_allclose(output(pooled, source_logits(pooled, x), x), expected, atol=1e-8)  # float64


def test_principal_components_keep_more_than_means():
    model, moments = layers.model(MULTI), layers.moments(MULTI)
    for mean, svd in zip(*(gqa(2, pooling)(model, moments)[1].layers for pooling in ("mean", "svd")), strict=True):
        assert mean.kept < svd.kept < 1


def test_means_are_means():
    model = layers.model(MULTI)
    converted, _ = gqa(2)(model)
    ours, theirs = read_source(converted, 1), read_source(model, 1)
    for name in ("key", "value"):
        rows = getattr(theirs, name)
        np.testing.assert_allclose(getattr(ours, name)[1], (rows[2] + rows[3]) / 2, atol=1e-7)  # stored in float32
    np.testing.assert_allclose(ours.query, theirs.query, atol=1e-7)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: gqa(3)(layers.model(MULTI)), "divisors of 4"),
        (lambda: gqa(2, "median"), "allowed: mean, svd"),
        (lambda: gqa(2, "svd")(layers.model(MULTI)), "needs them"),
    ],
)
def test_bad_input_is_refused(build, sentence):
    with pytest.raises(BadInput, match=sentence):
        build()
