"""Claims about reading a layer: its rows compute what the model does, and complex pairs are rotary pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.train.convert.source import as_channels, as_pairs, as_real_map, read_source
from tests.models.tiny_configs import CONFIGS
from tests.train.convert import layers
from tests.train.convert.dense import source_logits

KINDS = ["llama2", "llama-biases", "llama3.1", "qwen2.5-yarn"]


@pytest.mark.parametrize("name", KINDS)
def test_rows_compute_what_the_model_projects(name):
    source, x = layers.source(name), layers.inputs(name)
    attention = layers.model(name).blocks[1].attention
    q, k, v = attention.project(jnp.asarray(x[None, :, :-1], jnp.float32))
    for ours, theirs in ((source.query, q), (source.key, k), (source.value, v)):
        # float32 matmuls of width 64 against float64
        np.testing.assert_allclose(np.einsum("hdx,tx->thd", ours, x), theirs[0], atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_complex_pairs_turn_as_the_model_turns_them(name):
    source, x = layers.source(name), layers.inputs(name)
    attention = layers.model(name).blocks[1].attention
    q, k, _ = attention.project(jnp.asarray(x[None, :, :-1], jnp.float32))
    q, k = (attention.rotary(a, jnp.arange(len(x))[:, None]) for a in (q, k))
    expected = source.scale * jnp.einsum("btgrd,bsgd->bgrts", q.reshape(1, len(x), 2, 2, -1), k)
    # float32 against float64, logits of size 1
    np.testing.assert_allclose(source_logits(source, x), expected.reshape(4, len(x), len(x)), atol=2e-5)


def test_channels_are_the_inverse_of_pairs():
    rows = layers.source().query
    np.testing.assert_array_equal(as_channels(as_pairs(rows)), rows)


def test_a_real_map_does_what_the_complex_one_does():
    random = np.random.default_rng(0)
    linear = random.standard_normal((3, 5)) + 1j * random.standard_normal((3, 5))
    pairs = random.standard_normal((5, 2)) + 1j * random.standard_normal((5, 2))
    np.testing.assert_allclose(as_real_map(linear) @ as_channels(pairs), as_channels(linear @ pairs), atol=1e-13)


def test_norms_on_queries_and_keys_are_refused_in_a_sentence():
    assert CONFIGS["qwen3"]["model_type"] == "qwen3"
    with pytest.raises(BadInput, match="norms its queries and keys"):
        read_source(layers.model("qwen3"), 0)


@pytest.mark.parametrize("layer", [-1, 2])
def test_layers_that_do_not_exist_are_refused(layer):
    with pytest.raises(BadInput, match="allowed: 0 to 1"):
        read_source(layers.model(), layer)
