"""Claims about splits: apart from the rotations that are left out, they change no logit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.errors import BadInput
from kvx.train.convert.concentrated import Concentrated, Unsteady, mean_turns, principal_components
from kvx.train.convert.moments import about_mean
from kvx.train.convert.rotary_split import ChosenPairs, SharedMean, fresh_frequencies
from tests.models.tiny_configs import CONFIGS
from tests.train.convert import layers
from tests.train.convert.dense import source_logits, split_logits, turned

KINDS = ["llama2", "llama-biases", "llama3.1", "qwen2.5-yarn", "llama-multi-head"]
EXACT = 1e-10
"""float64, sums of some hundred products of size 1."""


@pytest.mark.parametrize("name", KINDS)
def test_all_pairs_chosen_is_the_source(name):
    source, x = layers.source(name), layers.inputs(name)
    split = ChosenPairs(source.kv_heads * source.head_dim, "high")(source, None)
    np.testing.assert_allclose(split_logits(source, split, x), source_logits(source, x), atol=EXACT)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("choice", ["norm", "high", "low", "uniform"])
def test_chosen_pairs_are_the_source_with_the_others_unrotated(name, choice):
    source, x, moments = layers.source(name), layers.inputs(name), layers.any_moments(layers.source(name))
    split = ChosenPairs(4 * source.kv_heads, choice)(source, moments)
    strength = np.sum(moments.query_norms.reshape(source.kv_heads, source.group, -1), 1) * moments.key_norms
    best = strength >= np.sort(strength, axis=1)[:, -2:-1]
    kept = {"norm": best, "high": np.arange(8) < 2, "low": np.arange(8) >= 6, "uniform": np.arange(8) % 4 == 0}[choice]
    kept = np.broadcast_to(kept, best.shape)
    np.testing.assert_array_equal(kept.sum(axis=1), 2)
    np.testing.assert_allclose(split_logits(source, split, x), source_logits(source, x, kept), atol=EXACT)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rule", [Concentrated, Unsteady])
def test_rotation_on_everything_is_exact_for_any_moments(name, rule):
    source, x = layers.source(name), layers.inputs(name)
    split = rule(source.kv_heads * source.head_dim)(source, layers.any_moments(source))
    assert split.content_key.shape[0] == 0 and split.rotary == source.kv_heads * source.head_dim
    np.testing.assert_allclose(split_logits(source, split, x), source_logits(source, x), atol=EXACT)


@pytest.mark.parametrize("name", ["llama-biases", "qwen2.5-yarn"])
def test_concentrated_is_the_source_with_only_the_first_components_rotated(name):
    source, x = layers.source(name), layers.inputs(name)
    moments, rotary = layers.any_moments(source), source.head_dim
    split = Concentrated(rotary)(source, moments)
    keys = (source.key_pairs.reshape(-1, x.shape[1]) @ x.T).reshape(source.kv_heads, -1, len(x))
    expected = []
    for head in range(source.heads):
        query, own, first = source.query_pairs[head] @ x.T, keys[head // source.group], []
        for pair in range(source.head_dim // 2):
            rows = source.key_pairs[:, pair]
            axis = np.linalg.eigh((rows @ moments.inputs @ rows.conj().T).real)[1][:, -1]
            first.append(axis[head // source.group] * (axis @ keys[:, pair]))
        first = np.stack(first)
        rotary_part = turned(query.T, first.T, source.frequencies)
        expected.append(rotary_part + turned(query.T, (own - first).T, 0 * source.frequencies))
    expected = source.scale * source.magnitude**2 * np.stack(expected)
    np.testing.assert_allclose(split_logits(source, split, x), expected, atol=EXACT)


@pytest.mark.parametrize(("rotary", "fold"), [(8, 2), (4, 4), (8, 4), (4, 8), (16, 4), (32, 4), (0, 2)])
def test_folded_frequencies_are_spread_evenly(rotary, fold):
    """Component s of group i turns at the frequency of pair i M + c s: base^(-2P / rotary) for the P-th pair."""
    source = layers.source()
    split = Concentrated(rotary, fold)(source, layers.any_moments(source))
    assert split.frequencies.shape == (1, rotary // 2)
    if 0 < rotary <= source.head_dim:
        expected = 10_000.0 ** (-2 * np.arange(rotary // 2) / rotary)
        # the source's frequencies are float32
        np.testing.assert_allclose(split.frequencies[0], expected, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), fold=st.sampled_from([1, 2, 4, 8]), phases=st.booleans())
def test_components_and_keys_are_each_other_s_inverse(seed, fold, phases):
    source = layers.source()
    weights = np.random.default_rng(seed).uniform(0.1, 2, (source.kv_heads, source.head_dim // 2))
    found = principal_components(source, layers.any_moments(source, seed).inputs, weights, fold=fold, phases=phases)
    np.testing.assert_allclose(found.synthesis @ found.analysis, np.eye(len(found.gain)), atol=1e-8)
    gains = found.gain.reshape(-1, source.kv_heads * fold)
    assert np.all(np.diff(gains, axis=1) <= 1e-9)
    # what the components hold together is the weighted energy of the keys
    inputs = layers.any_moments(source, seed).inputs
    energy = np.einsum("gp,gpx,xy,gpy->", weights, source.key_pairs.conj(), inputs, source.key_pairs).real
    np.testing.assert_allclose(gains.sum(), energy, rtol=1e-9)


def test_folding_and_phases_concentrate_more():
    """Each is a wider choice of axes: the first ones hold at least as much."""
    source = layers.source()
    inputs = layers.any_moments(source).inputs

    def held(count: int, **how) -> float:
        components = principal_components(source, inputs, **how)
        per_group = len(components.gain) // (8 // how.get("fold", 1))
        first = np.arange(len(components.gain)) % per_group < count
        return float(components.gain[first].sum())

    assert held(1, fold=1) < held(2, fold=2) < held(4, fold=4)
    assert held(1, fold=1) < held(1, fold=1, phases=True)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_first_unsteady_component_holds_more_than_any_other_axis_of_any_frequency(seed):
    """What is left unrotated, weighted as the docstring says, is least."""
    source, moments, random = layers.source(), layers.moments()[1], np.random.default_rng(seed)
    turns, weights = mean_turns(source, moments), np.zeros((source.kv_heads, 8))
    for head in range(source.heads):
        query, out = source.query_pairs[head], source.out[head]
        values = source.value[head // source.group]
        moved = source.scale**2 * np.trace(out.T @ values @ about_mean(moments.inputs) @ values.T @ out)
        power = np.einsum("px,xy,py->p", query.conj(), moments.inputs, query).real
        weights[head // source.group] += moved * power * (1 - np.abs(turns[head]) ** 2)
    weights = np.maximum(weights, 1e-6 * weights.max())

    def held(pair: int, axis: np.ndarray) -> float:
        rows = np.sqrt(weights[:, pair])[:, None] * source.key_pairs[:, pair]
        return (axis.conj() @ rows @ moments.attended @ rows.conj().T @ axis).real / np.sum(np.abs(axis) ** 2)

    # The rotated component's share of each head's key is its axis, up to a factor.
    split = Unsteady(2)(source, moments)
    pair = int(np.argmin(np.abs(source.frequencies - split.frequencies[0, 0])))
    reads = np.linalg.lstsq(source.key_pairs[:, pair].T, split.rotary_key[0, 0], rcond=None)[0]
    best = held(pair, (reads / np.sqrt(weights[:, pair])).conj())
    other = random.standard_normal(2) + 1j * random.standard_normal(2)
    assert held(random.integers(8), other) <= best * (1 + 1e-9)


def test_mean_turns_are_means_of_rotations():
    source = layers.source()
    moments = layers.any_moments(source)
    found = mean_turns(source, moments)
    back = np.arange(16)
    for head in (0, 3):
        angles = np.exp(-1j * back[:, None] * source.frequencies)
        np.testing.assert_allclose(found[head], np.average(angles, axis=0, weights=moments.distances[head]), atol=1e-12)


def test_the_mean_turn_is_the_position_free_factor_of_least_error():
    """Over distances as attention weighs them, for any pair: no other complex factor comes nearer to the rotation."""
    source = layers.source()
    moments = layers.any_moments(source)
    turns, back = mean_turns(source, moments), np.arange(16)

    def error(factor):
        rotations = np.exp(-1j * back * source.frequencies[1])
        return np.sum(moments.distances[0] * np.abs(rotations - factor) ** 2)

    best = error(turns[0, 1])
    np.testing.assert_allclose(best, 1 - np.abs(turns[0, 1]) ** 2, atol=1e-12)
    assert all(error(turns[0, 1] + step) > best for step in (0.1, -0.1, 0.1j, -0.1j))


def test_a_head_that_looks_one_place_back_needs_no_rotation():
    """All its attention is at one distance, so that the mean turn is the rotation itself."""
    source, x = layers.source(), layers.inputs()
    moments = layers.any_moments(source)
    moments.distances[:] = np.arange(16) == 1
    split = Unsteady(0)(source, moments)
    found, expected = split_logits(source, split, x), source_logits(source, x)
    next_to_it = (slice(None), np.arange(1, len(x)), np.arange(len(x) - 1))
    np.testing.assert_allclose(found[next_to_it], expected[next_to_it], atol=EXACT)


def test_shared_mean_takes_last_rows_and_pairs_neighbours():
    source, x = layers.source("llama-biases"), layers.inputs("llama-biases")
    split = SharedMean(6)(source)
    key = source.key.mean(axis=0)[-6:] @ x.T
    query = source.query[2][-6:] @ x.T
    angles = np.subtract.outer(np.arange(len(x)), np.arange(len(x)))[..., None] * split.frequencies[0]
    pairs = (query[0::2] - 1j * query[1::2]).T[:, None] * (key[0::2] + 1j * key[1::2]).T * np.exp(-1j * angles)
    content = (source.query[2][:-6] @ x.T).T @ (source.key[1][:-6] @ x.T)
    expected = source.scale * (pairs.sum(axis=-1).real + content)
    np.testing.assert_allclose(split_logits(source, split, x)[2], expected, atol=EXACT)


def test_fresh_frequencies_are_deepseek_s():
    """Sheet: base^(-2i / p); a scaled source gets YaRN, and cos and sin are multiplied by 0.1 ln(factor) + 1."""
    plain, magnitude = fresh_frequencies(CONFIGS["llama3"], 8)
    np.testing.assert_allclose(plain, 500000.0 ** (-np.arange(4) / 4), rtol=1e-6)  # float32
    assert magnitude == 1
    scaled, magnitude = fresh_frequencies(CONFIGS["llama3.1"], 8)
    assert magnitude == pytest.approx(0.1 * np.log(8) + 1) and scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 8, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda s, m: ChosenPairs(6)(s, m), "multiples of 4 up to 32"),
        (lambda s, m: ChosenPairs(36)(s, m), "multiples of 4 up to 32"),
        (lambda s, m: ChosenPairs(12, "uniform")(s, m), "divisors of 8"),
        (lambda s, m: ChosenPairs(8)(s, None), "needs them"),
        (lambda s, m: ChosenPairs(8, "best"), "choice='best'"),
        (lambda s, m: SharedMean(18)(s), "even numbers from 0 to 16"),
        (lambda s, m: Concentrated(8, 3)(s, m), "divisors of 8"),
        (lambda s, m: Concentrated(8, 1)(s, m), "gives 0.5 components"),
        (lambda s, m: Concentrated(8, 2)(s, None), "needs them"),
        (lambda s, m: Unsteady(33)(s, m), "even numbers from 0 to 32"),
    ],
)
def test_widths_that_heads_do_not_have_are_refused(build, sentence):
    source = layers.source()
    with pytest.raises(BadInput, match=sentence):
        build(source, layers.any_moments(source))
