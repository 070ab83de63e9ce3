"""Load a model and its tokenizer by name or path, and save them as a Hugging Face directory."""

import ctypes
from contextlib import nullcontext, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvx.mesh import on_host, place_model
from kvx.models.build import Model, config_from_model, model_from_checkpoint, tensors_from_model
from kvx.models.readers import read_checkpoint, write_checkpoint
from kvx.models.tokenizer import Tokenizer
from kvx.models.zoo import resolve


def load(
    name_or_path: str | PathLike[str], dtype: DTypeLike | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[Model, Tokenizer]:
    """A model and its tokenizer.

    Args:
        name_or_path: a zoo name ("smollm2-135m-instruct"), a Hugging Face directory, or a .gguf file.
        dtype: float32, bfloat16 or float16. None: float32 on a CPU, where bfloat16 arithmetic was 4 times slower,
            bfloat16 on accelerators.
        mesh: place the parameters on it by `kvx.mesh`'s rules, from the host's memory, so that no device ever holds
            more than its share. None: on the default device.

    Raises:
        BadInput: an unknown name, a file that cannot be read, or a model that kvx does not compute.
    """
    checkpoint = read_checkpoint(resolve(Path(name_or_path) if isinstance(name_or_path, PathLike) else name_or_path))
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    standard = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    with nullcontext() if mesh is None else on_host():
        model = model_from_checkpoint(checkpoint, standard if dtype is None else dtype)
    if mesh is not None:
        model = place_model(model, mesh)
    _give_back()
    return model, tokenizer


def _give_back() -> None:
    """Freed memory to the system, where the C library can: reading a vocabulary leaves 60 MiB behind in its heap."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def save(model: Model, tokenizer: Tokenizer | None, path: str | PathLike[str]) -> None:
    """Write a directory that `load` and transformers read: config.json, safetensors, the tokenizer's files.

    Args:
        model: its parameters are written in their own dtype, under Hugging Face names.
        tokenizer: None to leave its files out.
        path: a new directory, or an empty one.

    Raises:
        BadInput: a path that is in the way or cannot be written; nothing is left half-written.
    """
    specification: Any = None if tokenizer is None else tokenizer.specification
    special = {} if tokenizer is None else tokenizer.special
    write_checkpoint(Path(path), config_from_model(model), tensors_from_model(model), specification, special)
