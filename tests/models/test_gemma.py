"""Claims about Gemma 2 and 3: layer patterns, caps, scales, two rotary bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.models.build import abstract_model, random_model
from tests.models.reference_forward import reference_forward
from tests.models.tiny_configs import CONFIGS, GEMMA2, GEMMA3

FAMILY = [name for name in CONFIGS if name.startswith("gemma")]


def tokens(length=40):
    return jnp.asarray(np.random.default_rng(1).integers(0, 256, (1, length)), jnp.int32)


def windows(config):
    return [block.spec.window for block in abstract_model(config, jnp.float32).blocks]


def test_gemma2_alternates_local_first():
    assert windows(GEMMA2) == [48, None, 48, None]


def test_gemma3_has_five_local_layers_to_a_global_one():
    assert windows(GEMMA3) == [48, 48, 48, 48, 48, None, 48]
    assert windows(GEMMA3 | {"sliding_window_pattern": 2}) == [48, None, 48, None, 48, None, 48]
    assert windows(GEMMA3 | {"layer_types": ["full_attention"] * 7}) == [None] * 7


@pytest.mark.parametrize("name", FAMILY)
def test_blocks_of_equal_spec_share_a_treedef(name):
    blocks = abstract_model(CONFIGS[name], jnp.float32).blocks
    for one in blocks:
        for other in blocks:
            assert (jax.tree.structure(one) == jax.tree.structure(other)) == (one.spec == other.spec)


def test_gemma3_turns_local_layers_with_their_own_base_and_stretches_global_ones_only():
    config = GEMMA3 | {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    blocks = abstract_model(config, jnp.float32).blocks
    series = np.arange(0, 32, 2) / 32
    np.testing.assert_allclose(blocks[0].rotary.frequencies, 1e4**-series, rtol=1e-6)
    np.testing.assert_allclose(blocks[5].rotary.frequencies, 1e6**-series / 8, rtol=1e-6)
    nested = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}}
    nested["sliding_attention"] = {"rope_theta": 5e3, "rope_type": "default"}
    blocks = abstract_model(GEMMA3 | {"rope_parameters": nested}, jnp.float32).blocks
    np.testing.assert_allclose(blocks[0].rotary.frequencies, 5e3**-series, rtol=1e-6)
    np.testing.assert_allclose(blocks[5].rotary.frequencies, 1e6**-series / 8, rtol=1e-6)


def test_embeddings_are_scaled_by_the_root_of_the_width_in_the_models_dtype():
    model = random_model(GEMMA3 | {"hidden_size": 96})
    np.testing.assert_allclose(model.embed(tokens()), model.embedding(tokens()) * np.sqrt(96), rtol=1e-6)
    half = random_model(GEMMA3 | {"hidden_size": 96}, dtype=jnp.bfloat16)
    assert half.embed(tokens()).dtype == jnp.bfloat16


def test_a_zero_norm_weight_is_neutral():
    norm = random_model(GEMMA3).norm
    norm.weight.set_value(jnp.zeros(64))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)), jnp.float32)
    np.testing.assert_allclose(jnp.mean(norm(x) ** 2, axis=-1), 1, rtol=1e-3)


def test_final_logits_stay_below_their_cap():
    model = random_model(GEMMA2)
    assert jnp.abs(reference_forward(model, tokens())).max() < 1.5
    wide = random_model(GEMMA2 | {"final_logit_softcapping": None})
    assert jnp.abs(reference_forward(wide, tokens())).max() > 1.5


@pytest.mark.parametrize(
    ("config", "without"),
    [
        (GEMMA2, {"attn_logit_softcapping": None}),
        (GEMMA2, {"query_pre_attn_scalar": 32}),
        (GEMMA2, {"sliding_window": 1024}),
        (GEMMA3, {"sliding_window": 1024}),
        (GEMMA3, {"rope_local_base_freq": 1e6}),
        (CONFIGS["gemma3-stretched"], {"rope_scaling": None}),
    ],
)
def test_caps_windows_scales_and_bases_change_the_logits(config, without):
    """So that agreement with a peer at this length means something."""
    difference = reference_forward(random_model(config), tokens(200)) - reference_forward(
        random_model(config | without), tokens(200)
    )
    assert jnp.abs(difference[0, -1]).max() > 1e-3


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 in config.json is not supported"),
        (GEMMA2 | {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        (GEMMA2 | {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA3 | {"layer_types": ["full_attention"]}, "expected 7 entries"),
        (GEMMA3 | {"layer_types": ["odd"] * 7}, "layer_types"),
        (GEMMA3 | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
    ],
)
def test_bad_configs_are_refused_in_one_sentence(config, sentence):
    with pytest.raises(BadInput, match=sentence):
        abstract_model(config, jnp.float32)
