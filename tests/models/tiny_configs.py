"""Small configs of every architecture variant, as a Hugging Face config.json would hold them."""

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_SCALING = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}


def _config(architecture: str, model_type: str, **values) -> dict:
    return {**BASE, "architectures": [architecture], "model_type": model_type, **values}


LLAMA = _config("LlamaForCausalLM", "llama")
QWEN2 = _config("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True, rope_theta=1e6)
QWEN3 = _config("Qwen3ForCausalLM", "qwen3", head_dim=32, rope_theta=1e6)
GEMMA2 = _config(
    "Gemma2ForCausalLM", "gemma2", num_hidden_layers=4, head_dim=32, query_pre_attn_scalar=24, sliding_window=48
) | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA3 = _config(
    "Gemma3ForCausalLM", "gemma3_text", num_hidden_layers=7, head_dim=32, query_pre_attn_scalar=24, sliding_window=48
) | {"num_key_value_heads": 1, "hidden_activation": "gelu_pytorch_tanh"}

CONFIGS = {
    "llama2": LLAMA,
    "llama-multi-head": LLAMA | {"num_key_value_heads": 4},
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama3": LLAMA | {"rope_theta": 500000.0},
    "llama3.1": LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING},
    "llama3.2-tied": LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING, "tie_word_embeddings": True},
    "llama-linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "smollm2": LLAMA
    | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}
    | {"tie_word_embeddings": True, "rope_theta": 1e5},
    "mistral": _config("MistralForCausalLM", "mistral", sliding_window=48),
    "mistral-head-dim": _config("MistralForCausalLM", "mistral", sliding_window=None, head_dim=24),
    "qwen2": QWEN2,
    "qwen2-window": QWEN2 | {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1},
    "qwen2.5-yarn": QWEN2 | {"rope_scaling": YARN_SCALING},
    "qwen3": QWEN3,
    "qwen3-window-biases": QWEN3
    | {"use_sliding_window": True, "sliding_window": 48, "attention_bias": True}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma2": GEMMA2,
    "gemma2-head-dim-256": GEMMA2 | {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3": GEMMA3,
    "gemma3-stretched": GEMMA3
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6}
    | {"rope_local_base_freq": 10000.0, "num_hidden_layers": 6},
}
