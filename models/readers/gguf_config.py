"""The metadata of a GGUF file as a Hugging Face configuration.

Keys and their defaults are llama.cpp's, per architecture. Gemma files leave much unsaid: the pattern of local and
global layers, the local rotary base and the query scale are set here, as the Gemma 2 and Gemma 3 reports state them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvx.errors import BadInput, unknown
from kvx.models.readers.gguf_header import Header

_MODELS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
ARCHITECTURES = tuple(_MODELS)

# Query scales that are hidden / heads instead of the head dim: the 27B models (Gemma 2: 46 layers, Gemma 3: 62).
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
MAX_LAYERS = 1 << 12
MAX_WIDTH = 1 << 24


class _Keys:
    """Typed look-up of one architecture's metadata."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, file: str):
        self.metadata = metadata
        self.prefix = prefix
        self.file = file

    def refuse(self, key: str, value: Any, allowed: str) -> BadInput:
        return BadInput(f"GGUF file {self.file!r}: {self.prefix}.{key} is {str(value)[:80]}, {allowed}")

    def integer(self, key: str, default: int | None = None, most: int = MAX_WIDTH) -> int:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = int(value.flat[0])  # per-layer arrays of equal values are a scalar to us
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.refuse(key, "missing" if value is None else value, f"allowed are integers from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.refuse(key, "missing" if value is None else value, "allowed are positive numbers")
        return float(value)

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.metadata


def architecture(header: Header, file: str) -> str:
    """The file's architecture, one of `ARCHITECTURES`; BadInput for another."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise BadInput(f"GGUF file {file!r}: general.architecture is missing, supported are {', '.join(ARCHITECTURES)}")
    if name not in ARCHITECTURES:
        raise unknown("GGUF architecture", name, ARCHITECTURES)
    return name


def configuration(header: Header, file: str, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """A configuration with Hugging Face's keys.

    Args:
        header: of the file; vocabulary size, tied embeddings and biases are read off its tensors.
        file: its name, for refusals.
        rope_factors: the tensor rope_freqs.weight, or None.

    Raises:
        BadInput: a key that is missing or out of range, layers without tensors, unequal key and value widths.
    """
    kind = architecture(header, file)
    keys = _Keys(header.metadata, kind, file)
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise keys.refuse("attention.head_count_kv", kv_heads, f"allowed are divisors of the {heads} query heads")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    if head_dim % 2:
        raise keys.refuse("attention.key_length", head_dim, "allowed are even numbers")
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.refuse("attention.value_length", keys.integer("attention.value_length"), f"allowed is {head_dim}")
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise keys.refuse("rope.dimension_count", keys.integer("rope.dimension_count"), f"allowed is {head_dim}")
    model_type, name = _MODELS[kind]
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [name],
        "vocab_size": _embedding(header, hidden, file),
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": _layers(header, keys),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length", most=1 << 31),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 1e6 if kind == "gemma3" else 1e4),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }
    if (scaling := _rope_scaling(keys)) is not None:
        config["rope_scaling"] = scaling
    if rope_factors is not None:
        config["rope_factors"] = _factors(rope_factors, head_dim, file)
    if kind == "gemma2":
        config |= _gemma2(keys, config)
    elif kind == "gemma3":
        config |= _gemma3(keys, config)
    elif kind == "llama" and keys.has("attention.sliding_window"):
        config |= {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": keys.integer("attention.sliding_window", most=1 << 31),
        }
    return config | _token_ids(header.metadata, config["vocab_size"], file)


def _embedding(header: Header, hidden: int, file: str) -> int:
    info = header.tensors.get("token_embd.weight")
    if info is None:
        raise BadInput(f"GGUF file {file!r}: tensor 'token_embd.weight' is missing")
    if len(info.shape) != 2 or info.shape[1] != hidden:
        raise BadInput(f"GGUF file {file!r}: token_embd.weight has shape {info.shape}, allowed is (tokens, {hidden})")
    return info.shape[0]


def _layers(header: Header, keys: _Keys) -> int:
    """The layer count; every layer must have a norm in the file, so that a huge count cannot start a huge model."""
    layers = keys.integer("block_count", most=MAX_LAYERS)
    there = sum(name.startswith("blk.") and name.endswith(".attn_norm.weight") for name in header.tensors)
    if there != layers:
        raise keys.refuse("block_count", layers, f"the file holds the tensors of {there} layers")
    return layers


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.metadata.get(f"{keys.prefix}.rope.scaling.type", "linear")
    factor_key = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"
    if kind == "none" or not keys.has(factor_key):
        return None
    factor = keys.number(factor_key)
    if kind == "linear":
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise keys.refuse("rope.scaling.type", kind, "allowed are none, linear, yarn")
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if keys.has("rope.scaling.original_context_length"):
        length = keys.integer("rope.scaling.original_context_length", most=1 << 31)
        scaling["original_max_position_embeddings"] = length
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow"), ("attn_factor", None)):
        if not keys.has(f"rope.scaling.{theirs}"):
            continue
        if ours is None:
            # llama.cpp multiplies this with its own 1 + 0.1 ln(factor), which is Hugging Face's default.
            scaling["attention_factor"] = keys.number(f"rope.scaling.{theirs}") * (0.1 * math.log(factor) + 1)
        else:
            scaling[ours] = keys.number(f"rope.scaling.{theirs}")
    return scaling


def _factors(factors: np.ndarray, head_dim: int, file: str) -> list[float]:
    if factors.shape != (head_dim // 2,):
        raise BadInput(
            f"GGUF file {file!r}: rope_freqs.weight has shape {factors.shape}, allowed is ({head_dim // 2},)"
        )
    values = factors.astype(np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise BadInput(f"GGUF file {file!r}: rope_freqs.weight holds a factor that is not a positive finite number")
    return values.tolist()


def _gemma(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    large = config["num_hidden_layers"] == _GEMMA_27B_LAYERS[keys.prefix]
    scalar = config["hidden_size"] / config["num_attention_heads"] if large else config["head_dim"]
    if keys.has("attention.scale"):
        scalar = keys.number("attention.scale") ** -2
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.integer("attention.sliding_window", 4096, most=1 << 31),
    }


def _gemma2(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 2 (2024): local and global layers alternate, local first; attention and final logits are capped."""
    return _gemma(keys, config) | {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "layer_types": _layer_types(config["num_hidden_layers"], 2),
    }


def _gemma3(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3 (2025): five local layers, then a global one; local layers rotate with base 10000, unscaled."""
    capped = keys.has("final_logit_softcapping")
    return _gemma(keys, config) | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.number("final_logit_softcapping") if capped else None,
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 1e4),
        "layer_types": _layer_types(config["num_hidden_layers"], 6),
    }


def _layer_types(layers: int, period: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]


def _token_ids(metadata: Mapping[str, Any], vocabulary: int, file: str) -> dict[str, int]:
    ids = {}
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        key = f"tokenizer.ggml.{theirs}_token_id"
        value = metadata.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocabulary:
            raise BadInput(f"GGUF file {file!r}: {key} is {str(value)[:80]}, allowed are 0 to {vocabulary - 1}")
        ids[ours] = value
    return ids
