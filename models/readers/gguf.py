"""A GGUF file as a checkpoint: Hugging Face configuration and tensor names, weights dequantized one at a time.

What llama.cpp's converter does to the weights is undone here: the row order of Llama's rotary projections, and the 1
that it adds to Gemma's norm weights. What a file leaves unsaid (Gemma's local layers, bases, caps) is set by
architecture in `gguf_config`.
"""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from kvx.errors import BadInput
from kvx.models.checkpoint import Checkpoint
from kvx.models.readers.gguf_config import architecture, configuration
from kvx.models.readers.gguf_header import Header, TensorInfo, read_header
from kvx.models.readers.gguf_vocabulary import rebuild_tokenizer

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED = tuple(
    getattr(GGMLQuantizationType, name) for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)
SUPPORTED_TYPES = tuple(kind.name for kind in (*_PLAIN, *_QUANTIZED))

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = _LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.(weight|bias)")


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file of architecture llama, qwen2, qwen3, gemma2 or gemma3.

    Args:
        path: the file. It is mapped, not loaded; tensors are dequantized when asked for.

    Returns:
        A checkpoint whose tensors are float32 where the file is quantized, else in the file's dtype. Besides Hugging
        Face's keys its config may hold "rope_factors", a list of D / 2 floats: the rotary frequency of pair i is
        base ** (-2 i / D) / rope_factors[i] (Llama 3's scaling, as llama.cpp stores it).

    Raises:
        BadInput: a file that is missing, truncated, corrupt, or of another architecture or quantization.
    """
    data = _mapped(path)
    header = read_header(data, path.name)
    for info in header.tensors.values():
        if info.type.name not in SUPPORTED_TYPES:
            raise BadInput(
                f"GGUF file {path.name!r}: tensor {info.name!r} is of type {info.type.name}, "
                f"supported are {', '.join(SUPPORTED_TYPES)}"
            )
    kind = architecture(header, path.name)
    factors = header.tensors.get("rope_freqs.weight")
    config = configuration(header, path.name, None if factors is None else _read(data, factors))
    tensors = GgufTensors(data, _renamed(header, kind, config["num_hidden_layers"], path.name), kind, config)
    tokenizer, special = rebuild_tokenizer(header.metadata, config["vocab_size"], path.name)
    return Checkpoint(config, tensors, tokenizer, special)


class GgufTensors:
    """The tensors of a mapped GGUF file under Hugging Face names."""

    def __init__(self, data: mmap.mmap, infos: dict[str, TensorInfo], kind: str, config: dict):
        self._data = data
        self._infos = infos
        self._kind = kind
        self._heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor; KeyError for a name that is not there, BadInput for a projection that is not whole heads."""
        info = self._infos[name]
        array = _read(self._data, info)
        if self._kind == "llama" and (heads := self._heads.get(name.split(".")[-2])):
            if array.shape[0] % (2 * heads):
                raise BadInput(f"tensor {name!r} has {array.shape[0]} rows, allowed are multiples of {2 * heads}")
            return unpermuted(array, heads)
        if self._kind.startswith("gemma") and name.endswith("norm.weight"):
            return array.astype(np.float32) - np.float32(1)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, known without reading it."""
        return self._infos[name].shape


def unpermuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama query or key projection (or its bias) in Hugging Face's order.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + D / 2); the converter moves
    row i + j D / 2 (j = 0, 1) to 2 i + j. This undoes it.

    Args:
        array: (heads * D, ...) as in the file.
        heads: query heads for q, KV heads for k.
    """
    half = array.shape[0] // heads // 2
    return array.reshape(heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _mapped(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise BadInput(f"GGUF file {path.name!r}: it is empty, a GGUF file starts with b'GGUF'") from None
    except OSError as error:
        raise BadInput(f"GGUF file {str(path)!r} cannot be read: {error.strerror}") from None


def _read(data: mmap.mmap, info: TensorInfo) -> np.ndarray:
    if info.type in _PLAIN:
        dtype = _PLAIN[info.type]
        return np.frombuffer(data, dtype, info.nbytes // dtype.itemsize, info.offset).reshape(info.shape)
    block, size = GGML_QUANT_SIZES[info.type]
    raw = np.frombuffer(data, np.uint8, info.nbytes, info.offset)
    rows = raw.reshape(*info.shape[:-1], info.shape[-1] // block * size)
    # A corrupt scale may be inf or nan: the value is the file's, not a fault of the arithmetic.
    with np.errstate(all="ignore"):
        return dequantize(rows, info.type)


def _renamed(header: Header, kind: str, layers: int, file: str) -> dict[str, TensorInfo]:
    """Tensor infos by Hugging Face name; a name that the architecture does not have is refused."""
    per_layer = _GEMMA_LAYER if kind.startswith("gemma") else _LAYER
    infos: dict[str, TensorInfo] = {}
    for name, info in header.tensors.items():
        if name == "rope_freqs.weight":
            continue
        if name in _OUTSIDE:
            infos[_OUTSIDE[name]] = info
            continue
        match = _LAYER_NAME.fullmatch(name)
        if match is None or match[2] not in per_layer or int(match[1]) >= layers:
            raise BadInput(f"GGUF file {file!r}: tensor {name[:80]!r} is not part of a {kind} model of {layers} layers")
        infos[f"model.layers.{match[1]}.{per_layer[match[2]]}.{match[3]}"] = info
    return infos
