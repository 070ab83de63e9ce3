"""A model from a checkpoint and back: choose the architecture, check every name and shape, then fill one by one."""

import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from kvx.errors import BadInput, unknown
from kvx.models.checkpoint import Checkpoint, Tensors
from kvx.models.config_values import integer
from kvx.models.gemma import Gemma
from kvx.models.llama import Llama
from kvx.models.pieces import Piece
from kvx.models.text_part import text_part

Model = Llama | Gemma

# Hugging Face's name of the architecture, its model_type, and who computes it.
ARCHITECTURES: dict[str, tuple[str, type[Llama] | type[Gemma]]] = {
    "LlamaForCausalLM": ("llama", Llama),
    "MistralForCausalLM": ("mistral", Llama),
    "Qwen2ForCausalLM": ("qwen2", Llama),
    "Qwen3ForCausalLM": ("qwen3", Llama),
    "Gemma2ForCausalLM": ("gemma2", Gemma),
    "Gemma3ForCausalLM": ("gemma3_text", Gemma),
}


def abstract_model(config: Mapping[str, Any], dtype: DTypeLike) -> Model:
    """The model with `jax.ShapeDtypeStruct`s for parameters: no memory, for checks and ahead-of-time compilation.

    Args:
        config: as in a Hugging Face config.json.
        dtype: float32, bfloat16 or float16, of every parameter; rotary frequencies stay float32.

    Raises:
        BadInput: an architecture or a value that kvx does not compute.
    """
    dtype = _float_dtype(dtype)
    kind, family = _architecture(config)
    if config.get("quantization_config"):
        raise BadInput("quantization_config in config.json is not supported: expected float weights, or a GGUF file")
    return family({**config, "model_type": kind}, dtype)


def model_from_checkpoint(checkpoint: Checkpoint, dtype: DTypeLike) -> Model:
    """The model of a checkpoint, on the default device.

    Every tensor's name and shape is checked before memory is taken; then parameters are filled one at a time, so
    that beside the model at most one parameter and one tensor exist.

    Args:
        checkpoint: what a reader yields.
        dtype: float32, bfloat16 or float16; tensors are cast to it.

    Raises:
        BadInput: an unsupported architecture or value; a tensor that is missing, unexpected, or of a wrong shape.
    """
    checkpoint = text_part(checkpoint)
    layers = integer(checkpoint.config, "num_hidden_layers")
    if layers > len(checkpoint.tensors):
        raise BadInput(f"num_hidden_layers={layers} in config.json, but there are {len(checkpoint.tensors)} tensors")
    model = abstract_model(checkpoint.config, dtype)
    _check_tensors(model, checkpoint.tensors)
    for _, group in itertools.groupby(model.pieces(), key=lambda piece: id(piece.parameter)):
        pieces = list(group)
        parameter = pieces[0].parameter
        array = np.empty(parameter.shape, parameter.dtype)
        for piece in pieces:
            piece.write(_floats(piece, checkpoint.tensors[piece.name]), into=array)
        parameter.set_value(jnp.asarray(array))
    return model


def tensors_from_model(model: Model) -> "ModelTensors":
    """Every tensor of the model under its Hugging Face name and in its layout, read one at a time.

    A tied output matrix appears once, as the embedding.
    """
    return ModelTensors(model)


class ModelTensors:
    """The tensors of a model as those of a checkpoint (`kvx.models.checkpoint.Tensors`), in the model's dtype."""

    def __init__(self, model: Model):
        self._pieces = {piece.name: piece for piece in model.pieces()}

    def __getitem__(self, name: str) -> np.ndarray:
        piece = self._pieces[name]
        return piece.read(np.asarray(piece.parameter[...]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, known without reading it."""
        return self._pieces[name].shape


def config_from_model(model: Model) -> dict[str, Any]:
    """The Hugging Face config to save beside `tensors_from_model`: the one that the model was built from."""
    config = json.loads(model.source)
    names = [name for name, (kind, _) in ARCHITECTURES.items() if kind == config["model_type"]]
    return config | {"architectures": names}


def random_model(config: Mapping[str, Any], seed: int = 0, dtype: DTypeLike = np.float32) -> Model:
    """A model with random weights, the same for the same config and seed on every machine.

    Scaled so that activations and attention logits have a spread near 1: a test on it exercises every part.
    """
    return model_from_checkpoint(Checkpoint(config, RandomTensors(config, seed), None, {}), dtype)


class RandomTensors:
    """The tensors of an untrained checkpoint, made when they are read."""

    def __init__(self, config: Mapping[str, Any], seed: int):
        model = abstract_model(config, np.float32)
        self._shapes = {piece.name: piece.shape for piece in model.pieces()}
        # The weight that makes a norm neutral: Gemma multiplies by 1 + w.
        self._neutral = 1 - model.norm.offset
        self._seed = seed

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        noise = np.random.default_rng([self._seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
        if len(shape) == 2:
            return noise / np.float32(np.sqrt(shape[1]))
        return 0.1 * noise + (self._neutral if name.endswith("norm.weight") else 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, known without making it."""
        return self._shapes[name]


def _float_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        known = np.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known not in (np.float32, ml_dtypes.bfloat16, np.float16):
        raise BadInput(f"dtype={dtype if known is None else known.name}: expected float32, bfloat16 or float16")
    return known


def _architecture(config: Mapping[str, Any]) -> tuple[str, type[Llama] | type[Gemma]]:
    """By "architectures", which also tells a language model from a classifier; by "model_type" where it is absent."""
    names = config.get("architectures")
    if names:
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise BadInput(f"architectures={names!r} in config.json: expected a list with one name")
        if names[0] not in ARCHITECTURES:
            raise unknown("architecture", names[0], ARCHITECTURES)
        return ARCHITECTURES[names[0]]
    kinds = dict(ARCHITECTURES.values())
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise unknown("model_type", str(kind), kinds)
    return kind, kinds[kind]


def _check_tensors(model: Model, tensors: Tensors) -> None:
    """Refuse a checkpoint whose tensors are not exactly the model's, naming the first that differs."""
    expected = {piece.name: piece.shape for piece in model.pieces()}
    found = {name for name in tensors if name in expected or not _harmless(name, model)}
    if missing := [name for name in expected if name not in found]:
        raise BadInput(
            f"the checkpoint lacks tensor {missing[0]!r}{_more(missing)}: expected shape "
            f"{expected[missing[0]]} for its config.json"
        )
    if extra := sorted(found - expected.keys()):
        raise BadInput(f"the checkpoint has tensor {extra[0]!r}{_more(extra)}, which its config.json has no place for")
    for name, shape in expected.items():
        if tuple(tensors.shape(name)) != shape:
            raise BadInput(
                f"tensor {name!r} has shape {tuple(tensors.shape(name))}: expected {shape} for its config.json"
            )


def _harmless(name: str, model: Model) -> bool:
    """Buffers that old files carry (the default frequencies), and the second copy of a tied matrix."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and model.head is None)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _floats(piece: Piece, tensor: np.ndarray) -> Float[np.ndarray, "..."]:
    if tensor.shape != piece.shape:
        raise BadInput(f"tensor {piece.name!r} reads as shape {tensor.shape}: expected {piece.shape}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise BadInput(f"tensor {piece.name!r} has dtype {tensor.dtype.name}: expected floats")
    return tensor
