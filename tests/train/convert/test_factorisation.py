"""Claims about factorisations: what they lose is the tail of the spectrum, in the norm that was asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.errors import BadInput
from kvx.train.convert.factorisation import Metric, joint, separate
from kvx.train.convert.moments import about_mean
from kvx.train.convert.ranks import Energy
from kvx.train.convert.rotary_split import ChosenPairs, SharedMean
from kvx.train.convert.weighing import ByActivations, ByEffect, ByWeights
from tests.train.convert import layers

EXACT = 1e-9
"""float64, on numbers of size 1 to 100."""


def matrices(seed: int = 0, keys: int = 12, values: int = 16, width: int = 33):
    random = np.random.default_rng(seed)
    return random.standard_normal((keys, width)), random.standard_normal((values, width))


def positive(size: int, seed: int = 0) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((size, size))
    return root @ root.T / size


def restored(factors) -> tuple[np.ndarray, np.ndarray]:
    """Content keys' and values' matrices, without offsets."""
    return factors.key_up @ factors.down, factors.value_up @ factors.down


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 27))
def test_the_error_is_the_tail_of_the_spectrum(seed, rank):
    """Weighted on both sides: E ||L (M - M_r) x||^2 = sum of the squared singular values left out."""
    key, value = matrices(seed)
    metric = Metric(positive(12, seed), positive(16, seed + 1), positive(33, seed + 2))
    found = joint(key, value, metric)
    restored_key, restored_value = restored(found.at(rank))
    error = 0.0
    for rows, weights in ((key - restored_key, metric.keys), (value - restored_value, metric.values)):
        error += np.trace(weights @ rows @ metric.inputs @ rows.T)
    # the root's damping is 1e-7 of a mean eigenvalue
    np.testing.assert_allclose(error, np.sum(found.spectrum[rank:] ** 2), rtol=1e-4, atol=1e-5 * found.spectrum[0] ** 2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_weights_alone_give_the_svd(seed):
    key, value = matrices(seed)
    found, stacked = joint(key, value, Metric()), np.concatenate([key, value])
    np.testing.assert_allclose(found.spectrum, np.linalg.svd(stacked, compute_uv=False), rtol=1e-9)
    lost = stacked - np.concatenate(restored(found.at(5)))
    np.testing.assert_allclose(np.sum(lost**2), np.sum(found.spectrum[5:] ** 2), rtol=1e-9)
    assert found.at(5).kept == pytest.approx(np.sum(found.spectrum[:5] ** 2) / np.sum(stacked**2))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 20))
def test_activations_make_a_better_map_than_weights(seed, rank):
    """Over the inputs' own distribution no other map of this rank errs less, the SVD of the weights included."""
    key, value = matrices(seed)
    inputs = positive(33, seed)

    def error(factors) -> float:
        lost = np.concatenate([key, value]) - np.concatenate(restored(factors))
        return np.trace(lost @ inputs @ lost.T)

    best = error(joint(key, value, Metric(inputs=inputs)).at(rank))
    assert best <= error(joint(key, value, Metric()).at(rank)) * (1 + 1e-6)


def test_activations_are_principal_components_of_the_outputs():
    """TransMLA's step D: R = leading eigenvectors of the outputs' second moments, down = R^T M, up = R."""
    key, value = matrices()
    inputs, stacked = positive(33), np.concatenate([key, value])
    axes = np.linalg.eigh(stacked @ inputs @ stacked.T)[1][:, ::-1][:, :7]
    expected = axes @ axes.T @ stacked
    np.testing.assert_allclose(
        np.concatenate(restored(joint(key, value, Metric(inputs=inputs)).at(7))), expected, atol=1e-5
    )


@pytest.mark.parametrize("how", [joint, separate])
def test_full_rank_is_exact(how):
    key, value = matrices(keys=12, values=8)
    metric = Metric(positive(12), positive(8), positive(33))
    found = how(key, value, metric)
    for rows, expected in zip(restored(found.at(20)), (key, value), strict=True):
        np.testing.assert_allclose(rows, expected, atol=1e-6)  # roots of the weights are inverted


def test_repeating_heads_changes_sizes_and_nothing_else():
    """X-EcoMLA stacks keys and values repeated to all query heads: V^T is that of the stack without repeats, singular
    values are larger by sqrt(g) and U's rows smaller, and so energy ranks are equal."""
    source = layers.source()
    keys, values = (rows[:, :, :-1] for rows in (source.key, source.value))
    once = np.concatenate([keys.reshape(-1, 64), values.reshape(-1, 64)])
    often = np.concatenate([np.repeat(rows, source.group, axis=0).reshape(-1, 64) for rows in (keys, values)])
    left, spectrum, right = np.linalg.svd(once, full_matrices=False)
    copies, repeated, same = np.linalg.svd(often, full_matrices=False)
    count = len(spectrum) - 1  # the last singular value of a square matrix may be tiny
    np.testing.assert_allclose(repeated[: len(spectrum)], np.sqrt(source.group) * spectrum, atol=EXACT)
    np.testing.assert_allclose(np.abs(np.sum(right * same[: len(right)], axis=1))[:count], 1, atol=1e-6)
    heads = left.reshape(2, source.kv_heads, source.head_dim, -1)  # keys and values
    expected = np.repeat(heads, source.group, axis=1).reshape(len(copies), -1) / np.sqrt(source.group)
    np.testing.assert_allclose(np.abs(copies[:, :count]), np.abs(expected[:, :count]), atol=1e-6)
    for share in (0.3, 0.7, 0.95):
        assert Energy(share)([spectrum], (1,), 3) == Energy(share)([repeated], (1,), 3)


@pytest.mark.parametrize("side", ["down", "up", "split"])
def test_singular_values_may_go_anywhere(side):
    key, value = matrices()
    found = joint(key, value, Metric())
    for ours, expected in zip(restored(found.at(9, side)), restored(found.at(9)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=EXACT)
    factors = found.at(9, side)
    up = np.concatenate([factors.key_up, factors.value_up])
    expected = {"down": 1, "split": found.spectrum[:9], "up": found.spectrum[:9] ** 2}[side]
    np.testing.assert_allclose(np.sum(up**2, axis=0), expected * np.ones(9), atol=EXACT)


def test_separate_channels_serve_one_side_and_joint_ones_lose_no_more():
    key, value = matrices()
    apart, together = separate(key, value, Metric()), joint(key, value, Metric())
    factors = apart.at(9)
    assert np.all((np.abs(factors.key_up).max(axis=0) < EXACT) | (np.abs(factors.value_up).max(axis=0) < EXACT))
    assert together.at(9).kept >= factors.kept
    np.testing.assert_allclose(np.sum(apart.spectrum**2), np.sum(together.spectrum**2))


def test_the_centre_is_exact_at_any_rank():
    key, value = matrices()
    centre = np.append(np.random.default_rng(3).standard_normal(32), 1)
    factors = joint(key, value, Metric(inputs=positive(33), centre=centre)).at(2)
    latent = factors.down @ centre
    np.testing.assert_allclose(factors.key_up @ latent + factors.key_offset, key @ centre, atol=EXACT)
    np.testing.assert_allclose(factors.value_up @ latent + factors.value_offset, value @ centre, atol=EXACT)
    np.testing.assert_array_equal(factors.down[:, -1], 0)


def test_no_biases_stay_none():
    """Exact zeros: a layer without biases must not be given any by rounding."""
    key, value = matrices()
    key[:, -1] = value[:, -1] = 0
    for metric in (Metric(), Metric(inputs=positive(33))):
        assert not np.any(joint(key, value, metric).at(9).down[:, -1])


@pytest.mark.parametrize("rank", [0, 29])
def test_ranks_that_the_layer_does_not_have_are_refused(rank):
    with pytest.raises(BadInput, match="allowed: 1 to 28"):
        joint(*matrices(), Metric()).at(rank)


def test_balanced_keys_are_as_large_as_values():
    """BKV: mean norm of the keys' channels, divided by rho, is alpha times that of the values'."""
    source, moments = layers.source(), layers.moments()[1]
    split = ChosenPairs(8)(source, moments)
    metric = ByActivations(alpha=2.0)(source, split, moments)
    rho = 1 / np.sqrt(metric.keys[0, 0])
    sizes = [
        np.mean(np.sqrt(np.einsum("nx,xy,ny->n", rows, moments.inputs, rows)))
        for rows in (split.content_key / rho, source.value.reshape(-1, 65))
    ]
    assert sizes[0] == pytest.approx(2 * sizes[1])


def test_effect_weighs_keys_by_their_logits():
    """The keys' metric is the mean square of what their errors do to every head's logits, times what logits move."""
    source, moments = layers.source("llama-biases"), layers.moments("llama-biases")[1]
    split = ChosenPairs(8)(source, moments)
    metric = ByEffect()(source, split, moments)
    wrong = np.random.default_rng(0).standard_normal(len(split.content_key))
    expected = 0.0
    for head in range(source.heads):
        query = split.lift[head].T @ split.content_query[head]
        values, out = source.value[head // source.group], source.out[head]
        moved = np.trace(out.T @ values @ about_mean(moments.inputs) @ values.T @ out)
        expected += source.scale**2 * moved * (wrong @ query @ moments.inputs @ query.T @ wrong)
    assert wrong @ metric.keys @ wrong == pytest.approx(expected)
    error = np.random.default_rng(1).standard_normal((source.kv_heads, source.value.shape[1]))
    squares = sum(np.sum((error[h // source.group] @ source.out[h]) ** 2) for h in range(source.heads))
    assert error.ravel() @ metric.values @ error.ravel() == pytest.approx(squares)


def test_weights_alone_need_no_text_and_the_others_do():
    source = layers.source()
    split = SharedMean(4)(source)
    assert ByWeights()(source, split).inputs is None
    for rule in (ByActivations(), ByEffect()):
        with pytest.raises(BadInput, match="allowed: what measure_moments returns"):
            rule(source, split, None)
