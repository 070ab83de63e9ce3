"""Logits of every architecture variant equal those of transformers, with weights exchanged through a saved directory."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import torch
import transformers

from kvx.models.build import config_from_model, random_model, tensors_from_model
from kvx.models.readers import write_checkpoint
from tests.models.reference_forward import reference_forward
from tests.models.tiny_configs import CONFIGS

pytestmark = pytest.mark.peer
transformers.utils.logging.disable_progress_bar()

# Two float32 implementations that sum in different orders; measured below 2e-5 on these models.
TOLERANCE = 2e-4
# Past every window (48) and every original context (128) of the small configs.
TOKENS = 512


def peer_logits(path, tokens):
    peer = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return peer.eval()(torch.from_numpy(tokens)).logits.numpy()


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
