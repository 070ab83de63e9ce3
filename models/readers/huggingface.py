"""A Hugging Face directory (config.json, safetensors, tokenizer files) as a checkpoint.

Only JSON, safetensors and text templates are read: nothing is ever unpickled.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvx.errors import BadInput
from kvx.models.checkpoint import Checkpoint
from kvx.models.readers.safetensors import SafetensorsFile

_MIB = 1 << 20
# The largest files seen (Gemma 3: tokenizer.json 33 MB, tokenizer_config.json 1.2 MB), with room.
SIZE_LIMITS = {
    "config.json": 4 * _MIB,
    "generation_config.json": 4 * _MIB,
    "special_tokens_map.json": 4 * _MIB,
    "tokenizer_config.json": 16 * _MIB,
    "tokenizer.json": 96 * _MIB,
    "model.safetensors.index.json": 64 * _MIB,
    "chat_template.jinja": 4 * _MIB,
}
_INDEX = "model.safetensors.index.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_huggingface(path: Path) -> Checkpoint:
    """Read a directory with config.json and model.safetensors, or shards with their index.

    Args:
        path: the directory.

    Returns:
        A checkpoint with lazily read tensors; `special` also holds "eos_token_ids" from generation_config.json.

    Raises:
        BadInput: a file that is missing, too large, truncated or corrupt.
    """
    if not path.is_dir():
        raise BadInput(f"path is {str(path)!r}, allowed is a directory with config.json and safetensors files")
    config = _json(path, "config.json")
    if config is None:
        raise BadInput(f"directory {str(path)!r} has no config.json")
    return Checkpoint(config, _tensors(path), _json(path, "tokenizer.json"), _special(path, config))


class ShardedTensors:
    """The tensors of several safetensors files as one."""

    def __init__(self, files: Mapping[str, SafetensorsFile]):
        self._files = files  # by tensor name

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, known without reading it."""
        return self._files[name].shape(name)


def _tensors(path: Path) -> SafetensorsFile | ShardedTensors:
    if (path / "model.safetensors").is_file():
        return SafetensorsFile(path / "model.safetensors")
    index = _json(path, _INDEX)
    if index is None:
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        hint = ": pickled weights are never read, convert them" if pickled else ""
        raise BadInput(f"directory {str(path)!r} has neither model.safetensors nor {_INDEX}{hint}")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise BadInput(f"{_INDEX} in {str(path)!r} has no weight_map from tensor names to file names")
    shards = {}
    for place in sorted(set(places.values())):
        # A name with a folder in it could point outside the directory.
        if not re.fullmatch(r"[\w.-]+\.safetensors", place):
            raise BadInput(f"{_INDEX} names the file {place[:80]!r}, allowed are plain names ending in .safetensors")
        if not (path / place).is_file():
            raise BadInput(f"{_INDEX} names {place!r}, which is not in {str(path)!r}")
        shards[place] = SafetensorsFile(path / place)
    for name, place in places.items():
        if name not in shards[place]:
            raise BadInput(f"{_INDEX} places tensor {name[:80]!r} in {place!r}, where it is not")
    for place, shard in shards.items():
        for name in shard:
            if places.get(name) != place:
                raise BadInput(f"{place!r} holds tensor {name[:80]!r}, which {_INDEX} does not place there")
    return ShardedTensors({name: shards[place] for name, place in places.items()})


def _text(path: Path, name: str) -> str | None:
    """A text file's content, None if there is no such file."""
    file = path / name
    if not file.is_file():
        return None
    if (size := file.stat().st_size) > SIZE_LIMITS[name]:
        raise BadInput(f"{name} in {str(path)!r} has {size} bytes, allowed are {SIZE_LIMITS[name]}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{name} in {str(path)!r} is not UTF-8") from None
    except OSError as error:
        raise BadInput(f"{name} in {str(path)!r} cannot be read: {error.strerror}") from None


def _json(path: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no such file."""
    text = _text(path, name)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise BadInput(f"{name} in {str(path)!r} is not JSON: it is truncated or corrupt") from None
    if not isinstance(content, dict):
        raise BadInput(f"{name} in {str(path)!r} is not a JSON object")
    return content


def _special(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    tokenizer = _json(path, "tokenizer_config.json") or {}
    sources = (tokenizer, _json(path, "special_tokens_map.json") or {})
    special: dict[str, Any] = {}
    for name in _SPECIAL:
        for source in sources:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and name not in special:
                special[name] = token
    if isinstance(tokenizer.get("add_bos_token"), bool):
        special["add_bos_token"] = tokenizer["add_bos_token"]
    template = _text(path, "chat_template.jinja") or _template(tokenizer.get("chat_template"))
    if template is not None:
        special["chat_template"] = template
    generation = _json(path, "generation_config.json") or {}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and end >= 0 for end in ends):
        raise BadInput(f"eos_token_id in {str(path)!r} is {str(ends)[:80]}, allowed are non-negative integers")
    special["eos_token_ids"] = ends
    return special


def _template(entry: Any) -> str | None:
    """The chat template of tokenizer_config.json: a text, or a list of named ones of which "default" is meant."""
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None
