"""A GGUF file becomes a checkpoint with Hugging Face names, weights and configuration."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, RopeScalingType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvx.errors import BadInput
from kvx.models import zoo
from kvx.models.readers.gguf import SUPPORTED_TYPES, read_gguf, unpermuted
from tests.models.gguf_files import DIM, HEADS, HIDDEN, INNER, KV_HEADS, TOKENS, permuted, weights, write


def raw(kind: GGMLQuantizationType, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Blocks of random codes. Every 16-bit word stays below 0x3C00, so that any scale in it is a float16 below 1."""
    block, size = GGML_QUANT_SIZES[kind]
    words = np.random.default_rng(seed).integers(0, 0x3C00, (shape[0], shape[1] // block * size // 2), dtype=np.uint16)
    return words.view(np.uint8)


@pytest.mark.parametrize("name", SUPPORTED_TYPES)
def test_every_type_is_read_as_the_gguf_package_reads_it(name, tmp_path):
    kind = GGMLQuantizationType[name]
    tensors = weights("llama", 1)
    plain = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    shape = (INNER, 512)
    if name in plain:
        expected = np.random.default_rng(1).standard_normal(shape).astype(plain[name])
        data = (expected.view(np.uint8), kind) if name == "BF16" else expected
    else:
        blocks = raw(kind, shape)
        expected, data = dequantize(blocks, kind), (blocks, kind)
        assert np.isfinite(expected).all() and expected.std() > 0
    tensors["blk.0.ffn_up.weight"] = data
    checkpoint = read_gguf(write(tmp_path / "a.gguf", "llama", tensors, 1))
    found = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    assert found.dtype == expected.dtype and checkpoint.tensors.shape("model.layers.0.mlp.up_proj.weight") == shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("name", "step"), [("Q8_0", 1 / 127), ("Q4_0", 1 / 8), ("Q4_1", 1 / 15), ("Q5_1", 1 / 31)])
def test_quantized_weights_are_near_the_original(name, step, tmp_path):
    kind, tensors = GGMLQuantizationType[name], weights("llama", 1)
    original = tensors["blk.0.ffn_up.weight"]
    tensors["blk.0.ffn_up.weight"] = (quantize(original, kind), kind)
    found = read_gguf(write(tmp_path / "a.gguf", "llama", tensors, 1)).tensors["model.layers.0.mlp.up_proj.weight"]
    # One step of the code over the largest range of a row's only block, and float16's rounding of its scale.
    assert np.abs(found - original).max() <= step * np.ptp(original, axis=1).max() + 1e-2


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_every_architecture_reads_back_its_weights(kind, tmp_path):
    tensors = weights(kind)
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if kind == "llama" and "attn_q." in name:
            stored[name] = permuted(tensor, HEADS)
        elif kind == "llama" and "attn_k." in name:
            stored[name] = permuted(tensor, KV_HEADS)
        elif kind.startswith("gemma") and "norm" in name:
            stored[name] = tensor + np.float32(1)
    checkpoint = read_gguf(write(tmp_path / "a.gguf", kind, stored))
    gemma = kind.startswith("gemma")
    expected = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.1.ffn_norm.weight": f"model.layers.1.{'pre_feedforward' if gemma else 'post_attention'}_layernorm.weight",
        "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.1.attn_q.bias": "model.layers.1.self_attn.q_proj.bias",
        "blk.1.attn_q_norm.weight": "model.layers.1.self_attn.q_norm.weight",
        "blk.1.attn_k_norm.weight": "model.layers.1.self_attn.k_norm.weight",
        "blk.1.post_attention_norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "blk.1.post_ffw_norm.weight": "model.layers.1.post_feedforward_layernorm.weight",
    }
    assert len(checkpoint.tensors) == len(tensors) == len(list(checkpoint.tensors))
    for theirs, ours in expected.items():
        if theirs in tensors:
            assert checkpoint.tensors.shape(ours) == tensors[theirs].shape
            # (1 + w) - 1 in float32 loses at most half an ulp of 1 + w, below 4 for these draws.
            np.testing.assert_allclose(checkpoint.tensors[ours], tensors[theirs], atol=3e-7 if gemma else 0, rtol=0)


def test_configuration_of_a_llama_file(tmp_path):
    config = read_gguf(write(tmp_path / "a.gguf", "llama", weights("llama"))).config
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["intermediate_size"], config["vocab_size"]) == (HIDDEN, INNER, TOKENS)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (HEADS, KV_HEADS, DIM)
    assert (config["num_hidden_layers"], config["max_position_embeddings"], config["rope_theta"]) == (2, 128, 1e4)
    assert config["tie_word_embeddings"] and not config["attention_bias"] and "rope_scaling" not in config


def test_an_output_matrix_unties_the_embeddings(tmp_path):
    tensors = weights("llama") | {"output.weight": np.ones((TOKENS, HIDDEN), np.float32)}
    checkpoint = read_gguf(write(tmp_path / "a.gguf", "llama", tensors))
    assert not checkpoint.config["tie_word_embeddings"]
    assert checkpoint.tensors["lm_head.weight"].sum() == TOKENS * HIDDEN


def test_llama3_rope_factors_are_configuration_not_a_weight(tmp_path):
    factors = np.array([1, 1.5, 4, 8], np.float32)
    checkpoint = read_gguf(write(tmp_path / "a.gguf", "llama", weights("llama") | {"rope_freqs.weight": factors}))
    assert checkpoint.config["rope_factors"] == [1, 1.5, 4, 8]
    assert len(checkpoint.tensors) == len(weights("llama"))


def test_rope_scaling_keys_become_rope_scaling(tmp_path):
    def keys(writer):
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    config = read_gguf(write(tmp_path / "a.gguf", "qwen2", weights("qwen2"), keys=keys)).config
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_gemma3_pattern_and_local_base_come_from_the_architecture(tmp_path):
    def keys(writer):
        writer.add_sliding_window(16)

    config = read_gguf(write(tmp_path / "a.gguf", "gemma3", weights("gemma3", 12), layers=12, keys=keys)).config
    local, full = "sliding_attention", "full_attention"
    assert config["layer_types"] == ([local] * 5 + [full]) * 2
    assert (config["rope_local_base_freq"], config["rope_theta"], config["sliding_window"]) == (1e4, 1e6, 16)
    assert config["query_pre_attn_scalar"] == DIM and config["final_logit_softcapping"] is None


def test_gemma2_alternates_and_caps(tmp_path):
    config = read_gguf(write(tmp_path / "a.gguf", "gemma2", weights("gemma2"))).config
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 3))
def test_unpermuting_undoes_the_converter(heads, half, width):
    rows = heads * 2 * half
    array = np.arange(rows * width).reshape(rows, width)
    np.testing.assert_array_equal(unpermuted(permuted(array, heads), heads), array)
    np.testing.assert_array_equal(unpermuted(permuted(array[:, 0], heads), heads), array[:, 0])


def faulty(path: Path, fault: str) -> Path:
    """A file with one fault."""
    tensors, layers, without, keys, kind = weights("llama", 1), 1, (), None, "llama"
    if fault == "architecture":
        kind = "lama"
    elif fault == "type":
        tensors["blk.0.ffn_up.weight"] = (np.zeros((INNER, 84), np.uint8), GGMLQuantizationType.Q2_K)
    elif fault == "extra":
        tensors["blk.0.ffn_gate_inp.weight"] = np.zeros((4, HIDDEN), np.float32)
    elif fault == "embedding":
        del tensors["token_embd.weight"]
    elif fault == "layers":
        layers = 4000
    elif fault == "key":
        without = ("embedding_length",)
    elif fault == "heads":
        without, keys = ("attention.head_count_kv",), lambda writer: writer.add_head_count_kv(3)
    elif fault == "tokens":

        def keys(writer):
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["a", "b"])
    elif fault == "eos":

        def keys(writer):
            writer.add_eos_token_id(TOKENS)

    return write(path, kind, tensors, layers, keys, without)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("architecture", "unknown GGUF architecture 'lama': did you mean 'llama'"),
        ("type", "of type Q2_K, supported are F32"),
        ("extra", "'blk.0.ffn_gate_inp.weight' is not part of a llama model"),
        ("embedding", "'token_embd.weight' is missing"),
        ("layers", "block_count is 4000, the file holds the tensors of 1 layers"),
        ("key", "llama.embedding_length is missing, allowed are integers"),
        ("heads", "head_count_kv is 3, allowed are divisors"),
        ("tokens", "tokens has 2 entries, the embedding 48 rows"),
        ("eos", "eos_token_id is 48, allowed are 0 to 47"),
    ],
)
def test_a_fault_is_named(fault, reason, tmp_path):
    with pytest.raises(BadInput, match=reason):
        read_gguf(faulty(tmp_path / "bad.gguf", fault))


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(BadInput, match="empty"):
        read_gguf(tmp_path / "empty.gguf")


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_bytes_are_refused_or_read(kind, data, tmp_path):
    path = tmp_path / f"{kind}.gguf"
    if not path.exists():
        write(path, kind, weights(kind, 1) | {"rope_freqs.weight": np.ones(DIM // 2, np.float32)}, 1)
    content = bytearray(path.read_bytes())
    header = content.index(b"rope_freqs.weight") + 60
    for at, value in data.draw(st.lists(st.tuples(st.integers(8, header), st.integers(0, 255)), max_size=4)):
        content[at] = value
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(content)
    try:
        checkpoint = read_gguf(changed)
        for name in checkpoint.tensors:
            assert checkpoint.tensors[name].shape == checkpoint.tensors.shape(name)
    except BadInput as refusal:
        assert "\n" not in str(refusal)


@pytest.mark.weights
def test_smollm2_is_read_as_documented():
    checkpoint = read_gguf(zoo.fetch("smollm2-135m-instruct"))
    config = checkpoint.config
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (30, 9, 3)
    assert (config["max_position_embeddings"], config["rope_theta"], config["vocab_size"]) == (8192, 1e5, 49152)
    assert checkpoint.tensors.shape("model.layers.29.mlp.down_proj.weight") == (576, 1536)
    assert np.isfinite(checkpoint.tensors["model.layers.29.self_attn.k_proj.weight"]).all()
