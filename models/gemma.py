"""Gemma 2 and Gemma 3 (text) in one file.

What sets them apart from the Llama family: norms on both sides of attention and MLP, with weights stored around
zero (1 + w); embeddings scaled by sqrt(width); layers that alternate between a sliding window and full attention;
soft caps on attention and final logits (Gemma 2); a norm on each query and key head, and a second rotary base for
the sliding layers (Gemma 3). For layer input x (B, T, E):

    q, k, v = W_q n1(x), W_k n1(x), W_v n1(x)        not rotated: whoever stores keys rotates them
    x = x + n2(W_o attention(q, k, v))               logits scaled by query_pre_attn_scalar^-1/2, then capped
    x = x + n4(W_down(gelu(W_gate n3(x)) * W_up n3(x)))

Layers that the config's "kvx_mla" section names have latent attention instead (`kvx.models.mla`).

Sources: Gemma Team 2024 (Gemma 2), Gemma Team 2025 (Gemma 3).
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kvx.decoder import AttentionSpec
from kvx.models.attention import GroupedAttention
from kvx.models.block import DecoderBlock
from kvx.models.config_values import flag, heads, integer, layer_windows, only, optional_positive, positive
from kvx.models.latent_layers import latent_layers
from kvx.models.layers import Embedding, GatedMLP, RMSNorm
from kvx.models.mla import LatentAttention
from kvx.models.pieces import Piece, gated_pieces
from kvx.models.rope_frequencies import rope_frequencies


@dataclass(frozen=True)
class GemmaConfig:
    """What this file computes with, read from a Hugging Face config; widths and counts as their names say."""

    vocabulary: int
    max_positions: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    scale: float
    windows: tuple[int | None, ...]
    attention_cap: float | None
    final_cap: float | None
    qk_norm: bool
    tied: bool

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "GemmaConfig":
        """Checked values of a config whose "model_type" is gemma2 or gemma3_text.

        Raises:
            BadInput: a value is missing, out of range, or asks for something this file does not compute.
        """
        kind = config["model_type"]
        second = kind == "gemma2"
        only(config, "hidden_activation", "gelu_pytorch_tanh", kind)
        only(config, "attention_bias", False, kind)
        only(config, "use_bidirectional_attention", False, kind)
        if not second:
            # Gemma 3 replaced the cap on attention logits by the norms on queries and keys.
            only(config, "attn_logit_softcapping", None, kind)
        layers = integer(config, "num_hidden_layers", high=4096)
        every = 2 if second else integer(config, "sliding_window_pattern", 6)
        slides = tuple((i + 1) % every != 0 for i in range(layers))
        query_heads, kv_heads, head_dim = heads(config, default_head_dim=256)
        return cls(
            vocabulary=integer(config, "vocab_size"),
            max_positions=integer(config, "max_position_embeddings"),
            width=integer(config, "hidden_size"),
            hidden=integer(config, "intermediate_size"),
            heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            epsilon=positive(config, "rms_norm_eps", 1e-6),
            scale=positive(config, "query_pre_attn_scalar", 256.0) ** -0.5,
            windows=layer_windows(config, layers, integer(config, "sliding_window", 4096), slides),
            attention_cap=optional_positive(config, "attn_logit_softcapping", 50.0) if second else None,
            final_cap=optional_positive(config, "final_logit_softcapping", 30.0 if second else None),
            qk_norm=not second,
            tied=flag(config, "tie_word_embeddings", True),
        )


def gelu(x: Array) -> Array:
    """GELU in its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


class GemmaBlock(DecoderBlock):
    """One decoder layer."""

    def __init__(self, c: GemmaConfig, attention: GroupedAttention | LatentAttention, dtype: np.dtype):
        self.attention_norm = RMSNorm(c.width, c.epsilon, dtype, offset=1.0)
        self.attention = attention
        self.after_attention_norm = RMSNorm(c.width, c.epsilon, dtype, offset=1.0)

        self.mlp_norm = RMSNorm(c.width, c.epsilon, dtype, offset=1.0)
        self.mlp = GatedMLP(c.width, c.hidden, gelu, dtype)
        self.after_mlp_norm = RMSNorm(c.width, c.epsilon, dtype, offset=1.0)

    def join(self, x: Float[Array, "B T E"], attended: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The layer's output from its input and what attention adds to it."""
        x = x + self.after_attention_norm(attended)
        return x + self.after_mlp_norm(self.mlp(self.mlp_norm(x)))


class Gemma(nnx.Module):
    """A Gemma 2 or 3 text decoder; satisfies `kvx.decoder.Decoder`.

    Born without arrays: `kvx.models.build` fills the parameters.

    Attributes:
        source: the Hugging Face config it was built from, as JSON text, so that it can be saved again.
    """

    def __init__(self, config: Mapping[str, Any], dtype: np.dtype):
        c = GemmaConfig.from_huggingface(config)
        self.source = json.dumps(dict(config), sort_keys=True)
        self.vocabulary = c.vocabulary
        self.max_positions = c.max_positions
        self.final_cap = c.final_cap

        rotations = _rotations(config, c.head_dim)
        latent = latent_layers(config, len(c.windows))

        def attention(layer: int, window: int | None) -> GroupedAttention | LatentAttention:
            if layer in latent:
                return latent[layer].attention(c.width, dtype, window, c.attention_cap)
            spec = AttentionSpec(c.heads, c.kv_heads, c.head_dim, c.head_dim, c.scale, window, c.attention_cap)
            norm = partial(RMSNorm, c.head_dim, c.epsilon, dtype, offset=1.0) if c.qk_norm else None
            return GroupedAttention(c.width, spec, *rotations[window is not None], dtype, head_norm=norm)

        self.embedding = Embedding(c.vocabulary, c.width, dtype)
        self.blocks = nnx.List([GemmaBlock(c, attention(*each), dtype) for each in enumerate(c.windows)])
        self.norm = RMSNorm(c.width, c.epsilon, dtype, offset=1.0)
        self.head = None if c.tied else Embedding(c.vocabulary, c.width, dtype)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """The input of the first block, in the model's dtype."""
        x = self.embedding(tokens)
        # The factor itself is rounded to the model's dtype, as in training (Gemma 7B: 55.5 rather than 55.43).
        return x * jnp.asarray(math.sqrt(x.shape[-1]), x.dtype)

    def unembed(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch N"]:
        """float32 logits of the last block's output."""
        output = self.embedding if self.head is None else self.head
        logits = output.logits(self.norm(x))
        return logits if self.final_cap is None else self.final_cap * jnp.tanh(logits / self.final_cap)

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
            yield Piece(f"{layer}.post_attention_layernorm.weight", block.after_attention_norm.weight, "vector")
            yield Piece(f"{layer}.pre_feedforward_layernorm.weight", block.mlp_norm.weight, "vector")
            yield from gated_pieces(mlp, block.mlp.gate_up.kernel, "matrix", "weight")
            yield Piece(f"{mlp}.down_proj.weight", block.mlp.down.kernel, "matrix")
            yield Piece(f"{layer}.post_feedforward_layernorm.weight", block.after_mlp_norm.weight, "vector")
        yield Piece("model.norm.weight", self.norm.weight, "vector")
        if self.head is not None:
            yield Piece("lm_head.weight", self.head.table, "table")


def _rotations(config: Mapping[str, Any], head_dim: int) -> dict[bool, tuple[Float[np.ndarray, "P"], float]]:
    """Frequencies and magnitude of full (False) and sliding (True) layers.

    Gemma 2 has one rotation. Gemma 3's sliding layers keep the base 10000 and are never stretched: their window is
    shorter than any context.
    """
    if config["model_type"] == "gemma2":
        both = rope_frequencies(config, head_dim, base=10_000.0)
        return {False: both, True: both}
    full = rope_frequencies(config, head_dim, base=1_000_000.0, layer_type="full_attention")
    if "sliding_attention" not in (config.get("rope_parameters") or {}):
        local = {"max_position_embeddings": config["max_position_embeddings"]}
        local["rope_theta"] = config.get("rope_local_base_freq")
        return {False: full, True: rope_frequencies(local, head_dim, base=10_000.0)}
    sliding = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    return {False: full, True: rope_frequencies(sliding, head_dim, base=10_000.0, layer_type="sliding_attention")}
