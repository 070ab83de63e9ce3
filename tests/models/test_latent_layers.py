"""Saved latent models: what was written is read back bit for bit, in DeepSeek's names and order of rows."""

import json

import jax
import numpy as np
import pytest

import kvx
from kvx.models.build import abstract_model, tensors_from_model
from kvx.models.latent_layers import SECTION, latent_layers, section
from kvx.models.readers import read_checkpoint
from tests import tiny, tiny_latent
from tests.models.tiny_configs import GEMMA3


@pytest.mark.parametrize("kind", ["norms and a query rank", "biases", "no rotary key"])
def test_a_saved_hybrid_is_read_back_bit_for_bit(kind, tmp_path):
    model = tiny_latent.model(kind, latent=(0, 2))
    kvx.save(model, None, tmp_path / "model")
    checkpoint = read_checkpoint(tmp_path / "model")
    again = kvx.models.build.model_from_checkpoint(checkpoint, np.float32)
    for ours, theirs in zip(model.blocks, again.blocks, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert checkpoint.config["num_attention_heads"] == 4, "the source's own keys stay"


def test_names_and_order_of_rows_are_those_of_deepseek():
    """In a file, rotary pairs are neighbours behind the content rows of each head, and behind the latent."""
    model = tiny_latent.model("norms and a query rank", latent=(1,))
    tensors, attention = tensors_from_model(model), model.blocks[1].attention
    prefix = "model.layers.1.self_attn."
    assert {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)} == {
        "q_a_proj.weight",
        "q_a_layernorm.weight",
        "q_b_proj.weight",
        "kv_a_proj_with_mqa.weight",
        "kv_a_layernorm.weight",
        "kv_b_proj.weight",
        "o_proj.weight",
    }
    file = tensors[f"{prefix}kv_a_proj_with_mqa.weight"]
    ours = np.asarray(attention.kv_a.kernel[...]).T
    np.testing.assert_array_equal(file[:32], ours[:32])
    for pair in range(8):
        np.testing.assert_array_equal(file[32 + 2 * pair : 34 + 2 * pair], ours[[32 + pair, 40 + pair]])
    heads = tensors[f"{prefix}q_b_proj.weight"].reshape(4, 40, 12)
    ours = np.asarray(attention.q_b.kernel[...])
    np.testing.assert_array_equal(heads[2, 5], ours[:, 2, 5])
    np.testing.assert_array_equal(heads[2, 24 + 2 * 3 + 1], ours[:, 2, 24 + 8 + 3])


def test_a_config_alone_describes_the_model():
    """No memory is taken, as ahead-of-time compilation wants it; the other family too."""
    config = GEMMA3 | {SECTION: section({1: tiny_latent.layer()})}
    model = abstract_model(config, np.float32)
    assert isinstance(model.blocks[1].attention.kv_b.kernel.get_value(), jax.ShapeDtypeStruct)
    assert model.blocks[1].spec.window == 48 and model.blocks[1].spec.key_dim == 48


def test_the_section_keeps_every_bit_of_a_frequency():
    written = json.loads(json.dumps(section({0: tiny_latent.layer(), 2: tiny_latent.layer("biases")})))
    read = latent_layers({SECTION: written}, layers=3)
    assert sorted(read) == [0, 2] and read[2].config.out_bias
    np.testing.assert_array_equal(read[0].frequencies, tiny_latent.layer().frequencies)


BROKEN = {
    "names layer '3': expected 0 to 2": lambda layers: layers | {"3": layers["0"]},
    "names layer 'one': expected 0 to 2": lambda layers: {"one": layers["0"]},
    "expected an object with layers by their index": lambda layers: [],
    "lacks rank": lambda layers: {"0": {name: each for name, each in layers["0"].items() if name != "rank"}},
    "unknown key of layer 0 of kvx_mla in config.json 'ranc'": lambda layers: {"0": layers["0"] | {"ranc": 3}},
    "rank='32' of layer 0 of kvx_mla in config.json: expected int": lambda layers: {"0": layers["0"] | {"rank": "32"}},
    "bias=1 of layer 0 of kvx_mla in config.json: expected bool": lambda layers: {"0": layers["0"] | {"bias": 1}},
    "expected a list of frequencies": lambda layers: {"0": layers["0"] | {"frequencies": "fast"}},
    "expected 8 finite numbers": lambda layers: {"0": layers["0"] | {"frequencies": [1.0]}},
    "magnitude=-1.0 of latent attention": lambda layers: {"0": layers["0"] | {"magnitude": -1}},
    "layer 0 of kvx_mla in config.json is 5": lambda layers: {"0": 5},
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_a_broken_section_is_refused(sentence):
    layers = BROKEN[sentence](section({0: tiny_latent.layer()})["layers"])
    with pytest.raises(kvx.BadInput, match=sentence.replace("(", r"\(")):
        abstract_model({**tiny.CONFIG, "num_hidden_layers": 3, SECTION: {"layers": layers}}, np.float32)
