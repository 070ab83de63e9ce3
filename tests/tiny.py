"""A small random Llama for tests: four layers, grouped heads, weights wide enough that attention is peaked."""

from functools import cache

import jax.numpy as jnp
import numpy as np

from kvx.models.build import random_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@cache
def model(**changes):
    """The same model for every test; changes name config entries."""
    return random_model({**CONFIG, **changes}, seed=0, dtype=jnp.float32)


def prompts(*lengths: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded random prompts with junk in the padding, and their lengths."""
    random = np.random.default_rng(seed)
    tokens = np.stack([random.integers(0, 97, max(lengths)) for _ in lengths]).astype(np.int32)
    return tokens, np.asarray(lengths, np.int32)
