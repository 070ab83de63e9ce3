"""Claims about rotary frequencies: the published rules, their limits, and what is refused."""

import math

import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.models.rope_frequencies import rope_frequencies

CONFIG = {"max_position_embeddings": 4096, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def frequencies(head_dim=64, **values):
    return rope_frequencies(CONFIG | values, head_dim, base=10_000.0)


def test_default_is_a_geometric_series_from_one():
    plain, magnitude = frequencies(head_dim=8)
    np.testing.assert_allclose(plain, [1, 10**-1, 10**-2, 10**-3], rtol=1e-7)
    assert plain.dtype == np.float32 and magnitude == 1


def test_the_architectures_base_holds_where_the_config_names_none():
    plain, _ = rope_frequencies({"max_position_embeddings": 16}, 8, base=10_000.0)
    np.testing.assert_array_equal(plain, frequencies(head_dim=8)[0])


def test_linear_divides_every_frequency():
    np.testing.assert_allclose(frequencies(rope_scaling={"type": "linear", "factor": 4})[0], frequencies()[0] / 4)


def test_llama3_keeps_short_waves_and_divides_long_ones():
    plain, scaled = frequencies()[0], frequencies(rope_scaling=LLAMA3)[0]
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 512 / 4, wavelength > 512 / 1
    assert short.any() and long.any() and (~short & ~long).any()
    np.testing.assert_allclose(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8)
    between = (scaled / plain)[~short & ~long]
    assert np.all((between > 1 / 8) & (between < 1)) and np.all(np.diff(between) < 0)


def test_yarn_keeps_fast_channels_divides_slow_ones_and_sharpens():
    (plain, _), (scaled, magnitude) = frequencies(), frequencies(rope_scaling=YARN)
    turns = 1024 * plain / (2 * math.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(scaled[turns < 0.7], plain[turns < 0.7] / 4)
    assert magnitude == pytest.approx(0.1 * math.log(4) + 1)
    assert frequencies(rope_scaling=YARN | {"attention_factor": 1.5})[1] == 1.5


@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_a_factor_of_one_changes_nothing(scaling):
    np.testing.assert_allclose(frequencies(rope_scaling=scaling | {"factor": 1.0})[0], frequencies()[0], rtol=1e-6)


def test_both_spellings_of_a_config_agree():
    old = frequencies(rope_scaling=LLAMA3)[0]
    new, _ = rope_frequencies(
        {"max_position_embeddings": 4096, "rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}, 64, base=5.0
    )
    np.testing.assert_array_equal(old, new)


def test_factors_of_a_gguf_file_divide_each_frequency():
    plain, scaled = frequencies()[0], frequencies(rope_scaling=LLAMA3)[0]
    factors = (plain.astype(np.float64) / scaled).tolist()
    np.testing.assert_allclose(frequencies(rope_factors=factors)[0], scaled, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'.*change with the length"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "rope_type='longrope'",
        ),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type='spiral'.*expected one of default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor=-1"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor=nan"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0.*above low_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_theta": -5.0}, "rope_theta=-5.0"),
        ({"rope_theta": 1.0}, "rope_theta=1.0.*above 1"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({"rope_factors": [1.0, 2.0]}, "rotary factors.*a list of 32"),
        ({"rope_factors": [1.0] * 32, "rope_scaling": LLAMA3}, "both rope_factors and rope_scaling"),
        ({"rope_factors": [0.0] * 32}, "rotary factors"),
        ({"rope_factors": ["a"] * 32}, "rotary factors"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": "many"}}, "original_max_position_embeddings"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(values, sentence):
    with pytest.raises(BadInput, match=sentence) as refusal:
        frequencies(**values)
    assert "\n" not in str(refusal.value)
