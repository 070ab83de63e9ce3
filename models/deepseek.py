"""A model whose layers all have latent attention, written as a DeepSeek-V3 that transformers runs.

DeepSeek-V3 (2024) is narrower than `kvx.models.mla`, but most of what it lacks can be said in its terms, exactly:

- it norms the latent: where ours does not, one more latent channel is added that a bias holds at a large constant M.
  The root mean square is then M / sqrt(r + 1) up to a relative |c|^2 / 2 M^2, below the rounding of the dtype, and the
  gain takes it back. Ranks that differ over layers are filled up with zeros on the same occasion;
- one rotary key for all heads: blocks lie side by side in one key, each query zero outside its own;
- a fixed scale, (content + rotary)^(-1/2): ours is folded into the queries;
- frequencies by a rule: others, and a magnitude, are spelled as LongRoPE factors that do not depend on the length.

What remains is refused: layers without latent attention, or with other head counts and widths than the first (ranks of
normed latents included), frequencies that differ over layers, biases on queries or MLPs, sliding windows, Gemma.
"""

import math
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from kvx.errors import BadInput
from kvx.models.build import Model, config_from_model, tensors_from_model
from kvx.models.latent_layers import SECTION
from kvx.models.llama import Llama
from kvx.models.mla import EPSILON, LatentAttention
from kvx.models.readers import write_checkpoint
from kvx.models.rope_frequencies import rope_settings
from kvx.models.tokenizer import Tokenizer


def save_deepseek(model: Model, tokenizer: Tokenizer | None, path: str | PathLike[str]) -> None:
    """Write a directory that transformers loads as `DeepseekV3ForCausalLM`; `kvx.save` is what kvx reads back.

    Raises:
        BadInput: a model that DeepSeek-V3 cannot express, or a path that is in the way.
    """
    config, tensors = as_deepseek(model)
    specification: Any = None if tokenizer is None else tokenizer.specification
    special = {} if tokenizer is None else tokenizer.special
    write_checkpoint(Path(path), config, tensors, specification, special)


def as_deepseek(model: Model) -> tuple[dict[str, Any], "DeepseekTensors"]:
    """Config and tensors of the DeepSeek-V3 that computes what the model does.

    Returns:
        As in a Hugging Face directory; tensors are made when they are read.

    Raises:
        BadInput: a model that DeepSeek-V3 cannot express.
    """
    layers = _checked(model)
    tensors = DeepseekTensors(model)
    c, source = layers[0].config, config_from_model(model)
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    kept += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = {name: source[name] for name in kept if name in source} | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "rms_norm_eps": source.get("rms_norm_eps", 1e-6),
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.heads,
        "q_lora_rank": c.query_rank if c.query_norm else None,
        "kv_lora_rank": tensors.rank,
        "qk_nope_head_dim": c.content,
        "qk_rope_head_dim": c.rotary,
        "v_head_dim": c.value,
        "attention_bias": tensors.biased,
        "rope_interleave": True,
        # Every layer has a dense MLP.
        "first_k_dense_replace": source["num_hidden_layers"],
        "moe_intermediate_size": source["intermediate_size"],
    }
    return config | _rotation(layers[0], source), tensors


class DeepseekTensors:
    """The tensors of a DeepSeek-V3 checkpoint, made from a model's (`kvx.models.checkpoint.Tensors`).

    Attributes:
        rank: latent channels of every layer.
        biased: whether its attention has biases, which DeepSeek's have or have not together.
    """

    def __init__(self, model: Model):
        self._plain = tensors_from_model(model)
        self._layers = [block.attention for block in model.blocks]
        self._dtype = np.dtype(model.embedding.table.dtype)
        configs = [layer.config for layer in self._layers]
        self._normed = configs[0].latent_norm
        self.rank = max(c.rank for c in configs) + (0 if self._normed else 1)
        self.biased = not self._normed or any(c.bias or c.out_bias for c in configs)
        self._names: dict[str, int | None] = {name: None for name in self._plain if ".self_attn." not in name}
        for index in range(len(self._layers)):
            self._names |= dict.fromkeys((f"model.layers.{index}.self_attn.{name}" for name in self._own()), index)

    def __getitem__(self, name: str) -> np.ndarray:
        index = self._names[name]
        return self._plain[name] if index is None else self._layer(index)[name.split(".self_attn.")[1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; that of an attention's tensor by making it."""
        return self._plain.shape(name) if self._names[name] is None else self[name].shape

    def _own(self) -> list[str]:
        """Names of an attention's tensors."""
        c = self._layers[0].config
        queries = ["q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight"] if c.query_norm else ["q_proj.weight"]
        biases = ["kv_a_proj_with_mqa.bias", "o_proj.bias"] + (["q_a_proj.bias"] if c.query_norm else [])
        others = ["kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight"]
        return queries + others + (biases if self.biased else [])

    def _layer(self, index: int) -> Mapping[str, np.ndarray]:
        """Every tensor of one attention."""
        attention, prefix = self._layers[index], f"model.layers.{index}.self_attn."
        file = {name.removeprefix(prefix): self._plain[name] for name in self._plain if name.startswith(prefix)}
        wide = {name: tensor.astype(np.float64) for name, tensor in file.items()}
        made = self._queries(attention, wide) | self._latent(attention, wide)
        made["o_proj.weight"] = wide["o_proj.weight"]
        if self.biased:
            made["o_proj.bias"] = wide.get("o_proj.bias", np.zeros(len(made["o_proj.weight"])))
        return {name: tensor.astype(self._dtype) for name, tensor in made.items()}

    def _queries(self, attention: LatentAttention, wide: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Queries of DeepSeek's scale, as wide as all rotary blocks; a latent without a norm is multiplied out."""
        c = attention.config
        scale = c.scale * math.sqrt(c.content + c.rotary)
        last = wide["q_proj.weight" if c.query_rank is None else "q_b_proj.weight"]
        heads = scale * last.reshape(c.heads, c.key, -1)
        spread = np.zeros((c.heads, c.blocks, c.block, heads.shape[-1]))
        own = np.arange(c.heads)
        spread[own, own // (c.heads // c.blocks)] = heads[:, c.content :]
        placed = np.concatenate([heads[:, : c.content], spread.reshape(c.heads, c.rotary, -1)], axis=1)
        rows = placed.reshape(-1, heads.shape[-1])
        if not c.query_norm:
            return {"q_proj.weight": rows if c.query_rank is None else rows @ wide["q_a_proj.weight"]}
        assert c.query_rank is not None, "the norm is on the query's latent"
        made = {name: wide[name] for name in ("q_a_proj.weight", "q_a_layernorm.weight")} | {"q_b_proj.weight": rows}
        return made | ({"q_a_proj.bias": np.zeros(c.query_rank)} if self.biased else {})

    def _latent(self, attention: LatentAttention, wide: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Latent, rotary key and what is made of the latent; with a constant channel where ours has no norm."""
        c = attention.config
        down, up = wide["kv_a_proj_with_mqa.weight"], wide["kv_b_proj.weight"]
        bias = wide.get("kv_a_proj_with_mqa.bias", np.zeros(len(down)))
        gain = wide.get("kv_a_layernorm.weight", np.ones(c.rank))
        if not self._normed:
            more = self.rank - c.rank
            constant, one_gain, factor = self._constant(np.hypot(np.linalg.norm(down), np.linalg.norm(bias)))
            down = np.insert(down, [c.rank] * more, 0, axis=0)
            bias = np.insert(bias, [c.rank] * more, [0] * (more - 1) + [constant])
            up = np.pad(up * factor, ((0, 0), (0, more)))
            gain = np.full(self.rank, one_gain)
        made = {"kv_a_proj_with_mqa.weight": down, "kv_a_layernorm.weight": gain, "kv_b_proj.weight": up}
        return made | ({"kv_a_proj_with_mqa.bias": bias} if self.biased else {})

    def _constant(self, size: float) -> tuple[float, float, float]:
        """M, a gain, and the factor that is left, so that c is c again whatever their rounding.

        Args:
            size: Frobenius norm of what makes the latent of a normed input; a typical |c|.
        """
        margin = 2.0**12 if self._dtype.itemsize == 4 else 2.0**7
        constant = 2.0 ** math.ceil(math.log2(margin * max(size, 1e-3)))
        root = math.sqrt(constant**2 / self.rank + EPSILON)
        gain = float(np.asarray(root, self._dtype))
        return constant, gain, root / gain


def _checked(model: Model) -> list[LatentAttention]:
    """The layers' attention, if DeepSeek-V3 can express the model."""
    layers = [block.attention for block in model.blocks]
    if not isinstance(model, Llama):
        raise BadInput(
            "model is of the Gemma family, which DeepSeek-V3 cannot express: expected one of the Llama family"
        )
    plain = [index for index, layer in enumerate(layers) if not isinstance(layer, LatentAttention)]
    if plain:
        raise BadInput(f"layer {plain[0]} of the model has no latent attention: expected it in every layer")
    first = layers[0]
    alike = ("heads", "content", "value", "rotary", "blocks", "latent_norm", "query_norm")
    for index, (layer, block) in enumerate(zip(layers, model.blocks, strict=True)):
        names = alike + (("rank",) if first.config.latent_norm else ())
        names += ("query_rank",) if first.config.query_norm else ()
        for name in names:
            if (found := getattr(layer.config, name)) != (wanted := getattr(first.config, name)):
                raise BadInput(f"{name}={found} in layer {index}: expected {wanted} as in layer 0, for DeepSeek-V3")
        same = np.array_equal(layer.frequencies[...], first.frequencies[...]) and layer.magnitude == first.magnitude
        reasons = {
            "has rotary frequencies of its own": not same,
            "has a bias on its queries": layer.config.bias and bool(np.any(_query_bias(layer))),
            "has a sliding window": layer.spec.window is not None,
            "has a bias in its MLP": block.mlp.down.bias is not None,
            "has no rotary or no content channels": layer.config.rotary == 0 or layer.config.content == 0,
        }
        for reason, holds in reasons.items():
            if holds:
                raise BadInput(f"layer {index} of the model {reason}, which DeepSeek-V3 cannot express: expected none")
    return layers


def _query_bias(layer: LatentAttention) -> Float[np.ndarray, "H D"]:
    last = layer.q if layer.q is not None else layer.q_b
    assert last is not None and last.bias is not None, "asked where there is one"
    return np.asarray(last.bias[...], np.float32)


def _rotation(layer: LatentAttention, source: Mapping[str, Any]) -> dict[str, Any]:
    """The keys by which transformers comes to the layer's frequencies and magnitude."""
    base = float(rope_settings({**source, SECTION: None}, 10_000.0)["rope_theta"])
    frequencies = np.asarray(layer.frequencies[...], np.float64)
    theta = base ** (-np.arange(len(frequencies)) / len(frequencies))
    if layer.magnitude == 1 and np.allclose(frequencies, theta, rtol=1e-6, atol=0):
        return {"rope_theta": base}
    if np.any(frequencies <= 0):
        raise BadInput("rotary frequencies are not all above 0, which DeepSeek-V3 cannot express: expected them to be")
    factors = (theta / frequencies).tolist()
    scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0}
    scaling["attention_factor"] = layer.magnitude
    # Beyond any text, so that the one list is never exchanged for the other.
    scaling["original_max_position_embeddings"] = source["max_position_embeddings"]
    return {"rope_theta": base, "rope_scaling": scaling}
