"""Logits of every architecture variant equal those of transformers; weights travel through a saved directory."""

import pydoc_data.topics

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import torch
import transformers

from kvx.models.build import config_from_model, model_from_checkpoint, random_model, tensors_from_model
from kvx.models.load import load, save
from kvx.models.readers import read_checkpoint, write_checkpoint
from tests.models.reference_forward import reference_forward
from tests.models.tiny_configs import CONFIGS

pytestmark = pytest.mark.peer
transformers.utils.logging.disable_progress_bar()

# Two float32 implementations that sum in different orders; measured below 2e-5 on these models.
TOLERANCE = 2e-4
# Past every window (48) and every original context (128) of the small configs.
TOKENS = 512


def peer_logits(path, tokens, last=0):
    peer = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return peer.eval()(torch.from_numpy(tokens), logits_to_keep=last).logits.numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_random_model_equal_the_peers(name, tmp_path):
    model = random_model(CONFIGS[name], seed=3)
    write_checkpoint(tmp_path / "model", config_from_model(model), tensors_from_model(model), None, {})
    tokens = np.random.default_rng(0).integers(3, 256, (1, TOKENS))
    peer = peer_logits(tmp_path / "model", tokens)
    for forward in (reference_forward, lambda model, tokens: model(tokens)):
        ours = np.asarray(jax.jit(forward)(model, tokens.astype(np.int32)))
        assert np.abs(peer).max() > 1
        assert np.abs(ours - peer).max() < TOLERANCE


def test_the_text_part_of_a_multimodal_gemma_equals_the_peer(tmp_path):
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {key: value for key, value in CONFIGS["gemma3"].items() if key not in ("architectures", "model_type")}
    config = transformers.Gemma3Config(text_config=text, vision_config=tower | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    peer = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    peer.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 256, (1, TOKENS))
    with torch.no_grad():
        theirs = peer(torch.from_numpy(tokens)).logits.numpy()
    model = model_from_checkpoint(read_checkpoint(tmp_path), "float32")
    assert np.abs(np.asarray(model(jnp.asarray(tokens, jnp.int32))) - theirs).max() < TOLERANCE


@pytest.mark.weights
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", pytest.param("gemma3-270m", marks=pytest.mark.slow)])
def test_logits_of_real_weights_equal_the_peers(name, tmp_path):
    """From a quantized GGUF file through a saved directory: names, row order, norms and scalings are all right.

    Gemma's 262144 logits are compared after the last 16 tokens only, past its window of 512.
    """
    model, tokenizer = load(name, dtype="float32")
    save(model, tokenizer, tmp_path / "model")
    text = " ".join(pydoc_data.topics.topics["assignment"].split())
    tokens = np.asarray([tokenizer.encode(text)[:640]])
    peer = peer_logits(tmp_path / "model", tokens, last=16 if name.startswith("gemma") else 0)
    hidden = reference_forward(Headless(model), jnp.asarray(tokens, jnp.int32))
    ours = np.asarray(model.unembed(hidden[:, -peer.shape[1] :]))
    assert np.abs(peer).max() > 5
    assert np.abs(ours - peer).max() < TOLERANCE
    loss = -jax.nn.log_softmax(ours)[0, np.arange(peer.shape[1] - 1), tokens[0, 1 - peer.shape[1] :]].mean()
    assert loss < 4  # English prose, not noise that two programs agree on


class Headless:
    """A model whose output is the last block's."""

    def __init__(self, model):
        self.blocks, self.embed = model.blocks, model.embed

    def unembed(self, x):
        """x itself."""
        return x
