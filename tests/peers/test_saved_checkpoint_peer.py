"""Weights of GGUF files equal those that transformers reads, and directories that kvx saves load there."""

import numpy as np
import pytest

from kvx.models.readers import read_checkpoint, write_checkpoint
from tests.models.gguf_files import DIM, HEADS, KV_HEADS, TOKENS, permuted, weights, write

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer


def tiny(path, kind: str):
    """A GGUF file as llama.cpp's converter would write it."""
    layers = 6 if kind == "gemma3" else 2  # one period of its local and global layers
    stored = {}
    for name, tensor in weights(kind, layers).items():
        if kind == "llama" and ("attn_q." in name or "attn_k." in name):
            tensor = permuted(tensor, HEADS if "attn_q." in name else KV_HEADS)
        elif kind.startswith("gemma") and "norm" in name:
            tensor = tensor + np.float32(1)
        stored[name] = tensor

    def keys(writer):
        writer.add_vocab_size(TOKENS)  # transformers would take it from a tokenizer, which these files lack
        if kind.startswith("gemma"):
            writer.add_sliding_window(16)

    return write(path, kind, stored, layers, keys)


def assert_same(model, tensors):
    found = {name: value.numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert sorted(found) == sorted(tensors)
    for name in tensors:
        np.testing.assert_allclose(found[name], tensors[name], atol=3e-7, rtol=0)  # (1 + w) - 1 in float32


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_saved_directory_loads_in_transformers(kind, tmp_path):
    checkpoint = read_checkpoint(tiny(tmp_path / f"{kind}.gguf", kind))
    write_checkpoint(tmp_path / "m", checkpoint.config, checkpoint.tensors, None, {}, shard_bytes=20_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert_same(model, checkpoint.tensors)
    config = model.config
    assert (config.head_dim if hasattr(config, "head_dim") else DIM) == DIM
    assert config.tie_word_embeddings and config.num_key_value_heads == KV_HEADS
    if kind == "gemma3":
        bases = {layer: values["rope_theta"] for layer, values in config.rope_parameters.items()}
        assert bases == {"sliding_attention": 1e4, "full_attention": 1e6}
    with torch.no_grad():
        assert model(torch.zeros((1, 4), dtype=torch.long)).logits.isfinite().all()


# Not qwen3: transformers does not take its head dim from the file.
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gemma3"])
def test_weights_equal_those_that_transformers_reads_from_the_file(kind, tmp_path):
    path = tiny(tmp_path / f"{kind}.gguf", kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert_same(model, read_checkpoint(path).tensors)
