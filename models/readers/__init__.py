"""Readers: a file or directory as a checkpoint with Hugging Face names."""

from pathlib import Path

from kvx.errors import BadInput
from kvx.models.checkpoint import Checkpoint
from kvx.models.readers.gguf import read_gguf
from kvx.models.readers.huggingface import read_huggingface
from kvx.models.readers.huggingface_writer import write_checkpoint

__all__ = ["read_checkpoint", "read_gguf", "read_huggingface", "write_checkpoint"]


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face directory, or a .gguf file.

    Raises:
        BadInput: neither of the two, or one that cannot be read.
    """
    if path.is_dir():
        return read_huggingface(path)
    if path.suffix == ".gguf":
        return read_gguf(path)
    raise BadInput(f"path is {str(path)!r}, allowed are a directory with config.json and safetensors, or a .gguf file")
