"""What every reader yields: a Hugging Face style configuration, lazily read tensors, and the tokenizer's material."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Tensors(Protocol):
    """Named tensors of a checkpoint under Hugging Face names; read one at a time, so that peak memory stays low."""

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor in the file's own float dtype (or float32 where the file is quantized)."""
        ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, known without reading it."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        config: as in Hugging Face's config.json; a GGUF reader writes the same keys.
        tensors: under Hugging Face names ("model.layers.0.self_attn.q_proj.weight", (out, in)).
        tokenizer: a `tokenizers.Tokenizer` specification as JSON-able dict (the content of tokenizer.json), or None.
        special: "bos_token", "eos_token", ... as text, "chat_template" if there is one, "add_bos_token".
    """

    config: Mapping[str, Any]
    tensors: Tensors
    tokenizer: Mapping[str, Any] | None
    special: Mapping[str, Any]
