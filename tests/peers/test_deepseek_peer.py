"""Fully latent models give transformers' DeepseekV3ForCausalLM what they give here, with all that DeepSeek lacks."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.models.build import random_model
from kvx.models.deepseek import as_deepseek, save_deepseek
from kvx.models.latent_layers import SECTION, LatentLayer, section
from kvx.models.mla import LatentConfig
from kvx.train.convert import measure_moments, parse_recipe
from tests import tiny_latent
from tests.models.tiny_configs import LLAMA, QWEN2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

DEEPSEEK = {"heads": 4, "rank": 24, "rotary": 16, "content": 32, "value": 16, "scale": 48**-0.5, "latent_norm": True}
OURS = {"heads": 4, "rank": 24, "rotary": 16, "content": 32, "value": 16, "scale": 0.17}
# (widths of each of three layers, frequencies, magnitude)
RULE = 1e4 ** -(np.arange(8) / 8)
OWN = np.geomspace(1.0, 0.02, 8)
CASES = {
    "DeepSeek's own shape": ([DEEPSEEK] * 3, RULE, 1.0),
    "with a query rank": ([DEEPSEEK | {"query_rank": 20, "query_norm": True}] * 3, RULE, 1.0),
    "no latent norm": ([OURS] * 3, RULE, 1.0),
    "ranks that differ over layers": ([OURS | {"rank": rank} for rank in (8, 40, 16)], RULE, 1.0),
    "no norms, a query rank": ([OURS | {"query_rank": 20}] * 3, RULE, 1.0),
    "a rotary key for every group": ([OURS | {"blocks": 2}] * 3, RULE, 1.0),
    "frequencies without a rule": ([OURS | {"blocks": 4}] * 3, OWN, 1.0),
    "a magnitude": ([DEEPSEEK] * 3, OWN, 1.2),
    "a bias on the latent and on the output": ([DEEPSEEK | {"bias": True, "out_bias": True}] * 3, RULE, 1.0),
    "biases without norms": ([OURS | {"bias": True}] * 3, OWN, 1.0),
}


def made(widths: list, frequencies: np.ndarray, magnitude: float, base: dict = LLAMA):
    layers = {
        index: LatentLayer(LatentConfig(**each), frequencies.astype(np.float32), magnitude)
        for index, each in enumerate(widths)
    }
    model = random_model(base | {SECTION: section(layers)})
    for block in model.blocks:
        if isinstance(getattr(block.attention, "config", None), LatentConfig) and block.attention.config.bias:
            # DeepSeek's queries have no bias of their own.
            block.attention.q.bias.set_value(jnp.zeros_like(block.attention.q.bias[...]))
    return model


CONVERSIONS = (
    "x_ecomla(rank=24, rotary=8, query_rank=40)",
    "mha2mla(rank=24, rotary=8, choice='high')",
    "transmla(rank=24, rotary=8, norm=True)",
    "by_effect(rank=24, rotary=8, spread=True)",
)


def converted(text: str):
    source, texts = random_model(LLAMA), np.random.default_rng(1).integers(0, 256, (4, 32))
    return parse_recipe(text)(source, measure_moments(source, [texts]))[0]


@pytest.mark.parametrize("case", [*CASES, *CONVERSIONS])
def test_logits_agree(case, tmp_path):
    model = made(*CASES[case]) if case in CASES else converted(case)
    save_deepseek(model, None, tmp_path / "model")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = np.random.default_rng(0).integers(0, 256, (2, 40))
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    # Two libraries' float32, and a constant channel of 2^12 typical latents in place of a missing norm.
    np.testing.assert_allclose(model(jnp.asarray(tokens, jnp.int32)), wanted, atol=2e-4)


def test_sixteen_bits_are_rounded_once():
    """The constant channel's gain takes its own rounding back, so that bfloat16 weights keep what they have."""
    exact = made([OURS] * 3, RULE, 1.0)
    rounded = kvx.models.build.model_from_checkpoint(
        kvx.models.checkpoint.Checkpoint(
            kvx.models.build.config_from_model(exact), kvx.models.build.tensors_from_model(exact), None, {}
        ),
        jnp.bfloat16,
    )
    _, tensors = as_deepseek(rounded)
    prefix = "model.layers.1.self_attn."
    gain = np.asarray(tensors[f"{prefix}kv_a_layernorm.weight"], np.float64)
    constant = np.asarray(tensors[f"{prefix}kv_a_proj_with_mqa.bias"], np.float64)[24]
    up = np.asarray(tensors[f"{prefix}kv_b_proj.weight"], np.float64)[:, :24]
    ours = np.asarray(rounded.blocks[1].attention.kv_b.kernel[...], np.float64).reshape(24, -1).T
    effective = up * gain[:24] / np.sqrt(constant**2 / 25)
    # One rounding of bfloat16, 2^-9 of each weight.
    np.testing.assert_allclose(effective, ours, rtol=2**-8)
    assert abs(np.sum(effective * ours) / np.sum(ours**2) - 1) < 1e-3, "and no common factor"


REFUSED = {
    "layer 1 of the model has no latent attention": lambda: tiny_latent.model(latent=(0, 2)),
    "value=12 in layer 2: expected 16 as in layer 0": lambda: made([OURS, OURS, OURS | {"value": 12}], RULE, 1.0),
    "rank=8 in layer 1": lambda: made([DEEPSEEK, DEEPSEEK | {"rank": 8}, DEEPSEEK], RULE, 1.0),
    "layer 0 of the model has a sliding window": lambda: made(
        [OURS] * 3, RULE, 1.0, QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    ),
    "layer 0 of the model has a bias in its MLP": lambda: made([OURS] * 3, RULE, 1.0, LLAMA | {"mlp_bias": True}),
    "has no rotary or no content channels": lambda: made([OURS | {"rotary": 0}] * 3, RULE[:0], 1.0),
    "not all above 0": lambda: made([OURS] * 3, OWN * 0, 1.0),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_deepseek_cannot_express_is_refused(sentence):
    with pytest.raises(kvx.BadInput, match=sentence):
        as_deepseek(REFUSED[sentence]())
