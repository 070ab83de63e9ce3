"""The language model inside a multimodal Gemma 3 checkpoint (4B, 12B, 27B), as a checkpoint of its own.

The published files wrap the text decoder: its config is nested under "text_config", which leaves out what equals
Hugging Face's defaults, and its tensors carry a prefix beside those of the vision tower, which kvx does not use.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from kvx.errors import BadInput
from kvx.models.checkpoint import Checkpoint, Tensors

WRAPPER = "Gemma3ForConditionalGeneration"

# What Hugging Face's Gemma3TextConfig assumes for keys that kvx otherwise requires.
_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
# Tensor names as published in 2025, and as transformers writes them since 4.52.
_TEXT = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The text decoder of a multimodal Gemma 3 checkpoint; any other checkpoint as it is.

    Raises:
        BadInput: a wrapper without a "text_config".
    """
    names = checkpoint.config.get("architectures")
    if not isinstance(names, list | tuple) or WRAPPER not in names:
        return checkpoint
    inner = checkpoint.config.get("text_config")
    if not isinstance(inner, Mapping):
        raise BadInput(f"text_config={inner!r} in config.json: expected an object, the language model of a {WRAPPER}")
    config = {**_DEFAULTS, **inner, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in checkpoint.config:
            config[key] = checkpoint.config[key]
    return replace(checkpoint, config=config, tensors=TextTensors(checkpoint.tensors))


class TextTensors:
    """The text decoder's tensors under the names they would have on their own; the vision tower's are left out."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors
        self._names = {_alone(name): name for name in tensors if not name.startswith(_VISION)}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, known without reading it."""
        return self._tensors.shape(self._names[name])


def _alone(name: str) -> str:
    for prefix, plain in _TEXT.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name
