"""Claims about moments: they are means over the tokens of what the model computes, whatever the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.loop import attend
from kvx.train.convert.moments import about_mean, by_distance, measure_moments
from tests.train.convert import layers
from tests.train.convert.dense import attention, source_logits


def second_layer_inputs(texts: np.ndarray) -> np.ndarray:
    """Normed inputs of the second layer with a channel of ones, (B, T, X) float64."""
    model = layers.model()
    positions = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
    x, _, _ = attend(model.blocks[0], model.embed(jnp.asarray(texts)), positions)
    x = np.asarray(model.blocks[1].attention_norm(x), np.float64)
    return np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=-1)


def test_moments_are_means_over_tokens():
    texts = layers.texts(rows=3, length=12)
    (_, found), source = measure_moments(layers.model(), [texts]), layers.source()
    x = second_layer_inputs(texts)
    # the model's float32 activations, summed in float64
    np.testing.assert_allclose(found.inputs, np.einsum("btx,bty->xy", x, x) / texts.size, atol=1e-6)
    norms = np.abs(np.einsum("hpx,btx->bthp", source.query_pairs, x)).mean(axis=(0, 1))
    np.testing.assert_allclose(found.query_norms, norms, rtol=1e-5)
    norms = np.abs(np.einsum("gpx,btx->btgp", source.key_pairs, x)).mean(axis=(0, 1))
    np.testing.assert_allclose(found.key_norms, norms, rtol=1e-5)
    distances, received = np.zeros((source.heads, 12)), np.zeros((3, 12))
    for row, text in enumerate(x):
        for head, logits in enumerate(source_logits(source, text)):
            weights = attention(logits, np.eye(12))
            received[row] += weights.sum(axis=0) / source.heads
            distances[head] += [np.trace(weights, -back) for back in range(12)]
    np.testing.assert_allclose(found.distances, distances / texts.size, atol=1e-6)
    attended = np.einsum("bt,btx,bty->xy", received, x, x) / texts.size
    np.testing.assert_allclose(found.attended, attended, atol=1e-5)
    np.testing.assert_allclose(found.distances.sum(axis=1), 1, atol=1e-5)


def test_second_moments_of_keys_follow_from_those_of_inputs():
    x, source = second_layer_inputs(layers.texts()), layers.source()
    inputs = layers.moments()[1].inputs
    keys = np.einsum("gdx,btx->btgd", source.key, x)
    expected = np.einsum("btgd,btge->gde", keys, keys) / layers.texts().size
    np.testing.assert_allclose(source.key @ inputs @ source.key.transpose(0, 2, 1), expected, atol=1e-5)


def test_what_computes_takes_a_layer_at_a_time_and_finds_the_same():
    """The weights are in the host's memory; each layer's go to the device, and what is told of it comes back."""
    device, texts = jax.devices()[3], layers.texts()
    here, there = measure_moments(layers.model(), [texts]), measure_moments(layers.model(), [texts], device=device)
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_array_equal(ours.inputs, theirs.inputs)
        np.testing.assert_array_equal(ours.distances, theirs.distances)
    assert all(array.devices() == {jax.devices()[0]} for array in jax.tree.leaves(layers.model()))


@pytest.mark.slow
def test_batches_are_only_how_it_is_computed():
    texts = layers.texts()
    one, two = measure_moments(layers.model(), [texts]), measure_moments(layers.model(), [texts[:1], texts[1:]])
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(ours.inputs, theirs.inputs, atol=1e-5)  # float32 activations of other batch shapes
        np.testing.assert_allclose(ours.distances, theirs.distances, atol=1e-6)


def test_the_covariance_has_no_channel_of_ones():
    found = about_mean(layers.moments()[0].inputs)
    np.testing.assert_allclose(found[-1], 0, atol=1e-12)
    assert np.linalg.eigvalsh(found).min() > -1e-9


def test_distances_are_sums_of_diagonals():
    maps = np.tril(np.random.default_rng(0).random((2, 7, 7))).astype(np.float32)
    expected = [[np.trace(each, -back) for back in range(7)] for each in maps]
    np.testing.assert_allclose(by_distance(jnp.asarray(maps)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [([], "batches is empty"), ([np.zeros((1, 4), int), np.zeros((1, 5), int)], "allowed: one length")],
)
def test_texts_that_do_not_fit_are_refused(batches, sentence):
    with pytest.raises(BadInput, match=sentence):
        measure_moments(layers.model(), batches)
