"""The Llama family in one file: Llama 2 to 3.2, SmolLM2, Mistral, Qwen2 and 2.5, Qwen3.

Every member is the same computation with switches: biases on q, k, v (Qwen2), a norm on each query and key head
(Qwen3), a sliding window on some or all layers (Mistral, Qwen). For layer input x (B, T, E):

    q, k, v = W_q n(x), W_k n(x), W_v n(x)          n = RMS norm; not rotated: whoever stores keys rotates them
    x = x + W_o attention(q, k, v)
    x = x + W_down(silu(W_gate n(x)) * W_up n(x))

Layers that the config's "kvx_mla" section names have latent attention instead (`kvx.models.mla`).

Sources: Touvron et al. 2023 (Llama), Dubey et al. 2024 (Llama 3), Jiang et al. 2023 (Mistral 7B), Yang et al. 2024
and 2025 (Qwen2, Qwen3), Allal et al. 2025 (SmolLM2).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kvx.decoder import AttentionSpec
from kvx.models.attention import GroupedAttention
from kvx.models.block import DecoderBlock
from kvx.models.config_values import flag, heads, integer, layer_windows, only, optional_integer, positive
from kvx.models.latent_layers import latent_layers
from kvx.models.layers import Embedding, GatedMLP, RMSNorm
from kvx.models.mla import LatentAttention
from kvx.models.pieces import Piece, gated_pieces
from kvx.models.rope_frequencies import rope_frequencies


@dataclass(frozen=True)
class LlamaConfig:
    """What this file computes with, read from a Hugging Face config; widths and counts as their names say."""

    vocabulary: int
    max_positions: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    windows: tuple[int | None, ...]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Checked values of a config whose "model_type" is llama, mistral, qwen2 or qwen3.

        Raises:
            BadInput: a value is missing, out of range, or asks for something this file does not compute.
        """
        kind = config["model_type"]
        only(config, "hidden_act", "silu", kind)
        layers = integer(config, "num_hidden_layers", high=4096)
        query_heads, kv_heads, head_dim = heads(config, default_head_dim=128 if kind == "qwen3" else None)
        bias = kind != "mistral" and flag(config, "attention_bias", False)
        return cls(
            vocabulary=integer(config, "vocab_size"),
            max_positions=integer(config, "max_position_embeddings"),
            width=integer(config, "hidden_size"),
            hidden=integer(config, "intermediate_size"),
            heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            epsilon=positive(config, "rms_norm_eps", 1e-6),
            windows=_windows(config, kind, layers),
            qkv_bias=bias or kind == "qwen2",
            out_bias=bias and kind != "qwen2",
            mlp_bias=kind == "llama" and flag(config, "mlp_bias", False),
            qk_norm=kind == "qwen3",
            tied=flag(config, "tie_word_embeddings", False),
        )


def _windows(config: Mapping[str, Any], kind: str, layers: int) -> tuple[int | None, ...]:
    """Mistral: every layer. Qwen: with use_sliding_window, the layers from max_window_layers on. Llama: none."""
    if kind == "mistral":
        return (optional_integer(config, "sliding_window", 4096),) * layers
    if kind == "llama":
        return (None,) * layers
    window = optional_integer(config, "sliding_window", 4096) if flag(config, "use_sliding_window", False) else None
    first = integer(config, "max_window_layers", 28, low=0)
    return layer_windows(config, layers, window, tuple(window is not None and i >= first for i in range(layers)))


class LlamaBlock(DecoderBlock):
    """One decoder layer."""

    def __init__(self, c: LlamaConfig, attention: GroupedAttention | LatentAttention, dtype: np.dtype):
        self.attention_norm = RMSNorm(c.width, c.epsilon, dtype)
        self.attention = attention
        self.mlp_norm = RMSNorm(c.width, c.epsilon, dtype)
        self.mlp = GatedMLP(c.width, c.hidden, jax.nn.silu, dtype, c.mlp_bias)

    def join(self, x: Float[Array, "B T E"], attended: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The layer's output from its input and what attention adds to it."""
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """A decoder of the Llama family; satisfies `kvx.decoder.Decoder`.

    Born without arrays: `kvx.models.build` fills the parameters.

    Attributes:
        source: the Hugging Face config it was built from, as JSON text, so that it can be saved again.
    """

    def __init__(self, config: Mapping[str, Any], dtype: np.dtype):
        c = LlamaConfig.from_huggingface(config)
        self.source = json.dumps(dict(config), sort_keys=True)
        self.vocabulary = c.vocabulary
        self.max_positions = c.max_positions

        rotation = rope_frequencies(config, c.head_dim, base=10_000.0)
        latent = latent_layers(config, len(c.windows))

        def attention(layer: int, window: int | None) -> GroupedAttention | LatentAttention:
            if layer in latent:
                return latent[layer].attention(c.width, dtype, window)
            spec = AttentionSpec(c.heads, c.kv_heads, c.head_dim, c.head_dim, c.head_dim**-0.5, window)
            biases = {"qkv_bias": c.qkv_bias, "out_bias": c.out_bias}
            norm = partial(RMSNorm, c.head_dim, c.epsilon, dtype) if c.qk_norm else None
            return GroupedAttention(c.width, spec, *rotation, dtype, head_norm=norm, **biases)

        self.embedding = Embedding(c.vocabulary, c.width, dtype)
        self.blocks = nnx.List([LlamaBlock(c, attention(*each), dtype) for each in enumerate(c.windows)])
        self.norm = RMSNorm(c.width, c.epsilon, dtype)
        self.head = None if c.tied else Embedding(c.vocabulary, c.width, dtype)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """The input of the first block, in the model's dtype."""
        return self.embedding(tokens)

    def unembed(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch N"]:
        """float32 logits of the last block's output."""
        output = self.embedding if self.head is None else self.head
        return output.logits(self.norm(x))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T N"]:
        """float32 logits after every token of a plain forward pass, nothing cached."""
        from kvx.loop import forward

        return forward(self, tokens)

    def pieces(self) -> Iterator[Piece]:
        """Where every tensor of a Hugging Face checkpoint lives."""
        yield Piece("model.embed_tokens.weight", self.embedding.table, "table")
        for i, block in enumerate(self.blocks):
            layer = f"model.layers.{i}"
            mlp = f"{layer}.mlp"
            yield Piece(f"{layer}.input_layernorm.weight", block.attention_norm.weight, "vector")
            yield from block.attention.pieces(f"{layer}.self_attn")
            yield Piece(f"{layer}.post_attention_layernorm.weight", block.mlp_norm.weight, "vector")
            yield from gated_pieces(mlp, block.mlp.gate_up.kernel, "matrix", "weight")
            yield Piece(f"{mlp}.down_proj.weight", block.mlp.down.kernel, "matrix")
            if block.mlp.gate_up.bias is not None and block.mlp.down.bias is not None:
                yield from gated_pieces(mlp, block.mlp.gate_up.bias, "vector", "bias")
                yield Piece(f"{mlp}.down_proj.bias", block.mlp.down.bias, "vector")
        yield Piece("model.norm.weight", self.norm.weight, "vector")
        if self.head is not None:
            yield Piece("lm_head.weight", self.head.table, "table")
