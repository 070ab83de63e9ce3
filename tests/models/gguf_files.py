"""Tiny GGUF files of every architecture, written with the gguf package."""

import itertools
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

HIDDEN, HEADS, KV_HEADS, DIM, INNER, TOKENS = 32, 4, 2, 8, 64, 48


def weights(kind: str, layers: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors of a tiny model in ggml's names."""
    draw = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (TOKENS, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(layers):
        part = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * DIM, HIDDEN),
            "attn_k.weight": (KV_HEADS * DIM, HIDDEN),
            "attn_v.weight": (KV_HEADS * DIM, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * DIM),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (INNER, HIDDEN),
            "ffn_up.weight": (INNER, HIDDEN),
            "ffn_down.weight": (HIDDEN, INNER),
        }
        if kind == "qwen2":
            part |= {f"attn_{n}.bias": (h * DIM,) for n, h in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
        if kind in ("qwen3", "gemma3"):
            part |= {"attn_q_norm.weight": (DIM,), "attn_k_norm.weight": (DIM,)}
        if kind.startswith("gemma"):
            part |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in part.items()}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(path: Path, kind: str, tensors: dict, layers: int = 2, keys=None, without=()) -> Path:
    """A GGUF file; a tensor may be a pair (raw bytes, ggml type)."""
    writer = GGUFWriter(path, kind)
    numbers = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": layers,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": DIM,
        "attention.value_length": DIM,
    }
    for key, value in numbers.items():
        if key not in without:
            writer.add_uint32(f"{kind}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    if keys is not None:
        keys(writer)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """The converter's row order, row by row: row i + j D / 2 of a head goes to 2 i + j."""
    dim = array.shape[0] // heads
    out = np.empty_like(array)
    for head, i, j in itertools.product(range(heads), range(dim // 2), range(2)):
        out[head * dim + 2 * i + j] = array[head * dim + i + j * dim // 2]
    return out
