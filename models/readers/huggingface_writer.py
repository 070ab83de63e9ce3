"""Writing a checkpoint as a Hugging Face directory that kvx and transformers both read.

Everything is written to a temporary folder beside the target and renamed at the end: an interrupted or refused save
leaves nothing.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvx.destinations import umask
from kvx.errors import BadInput
from kvx.models.checkpoint import Tensors
from kvx.models.readers.safetensors import SafetensorsWriter
from kvx.models.rope_frequencies import with_plain_rope_factors

SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = ("float32", "float16", "bfloat16")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    tensors: Tensors | Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None,
    special: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, the weights, and the tokenizer's files.

    Args:
        path: the directory to make; it must not exist, or be empty.
        config: Hugging Face's keys. "rope_factors" (from a GGUF file) is written as the `rope_scaling` it amounts to.
        tensors: arrays by Hugging Face name, taken one at a time.
        tokenizer: the content of tokenizer.json, or None.
        special: as in `Checkpoint.special`.
        shard_bytes: weights above this size are split into files of at most it, with an index.

    Raises:
        BadInput: a target that is in the way, a dtype that safetensors does not have, a failed write.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"path is {str(path)!r}, which exists: allowed is a new name or an empty directory")
    settings = with_plain_rope_factors(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise BadInput(f"path is {str(path)!r}, which cannot be written: {error.strerror}") from None
    try:
        os.chmod(folder, 0o777 & ~umask())  # a folder for a while is private, a model's has the rights of any other
        dtypes = _write_weights(folder, tensors, shard_bytes)
        if len(dtypes) == 1 and (dtype := dtypes.pop()) in _DTYPE_NAMES:
            settings["torch_dtype"] = dtype
        _write_json(folder / "config.json", settings)
        if tokenizer is not None:
            _write_json(folder / "tokenizer.json", tokenizer)
            _write_json(folder / "tokenizer_config.json", _tokenizer_config(settings, special))
        if ends := special.get("eos_token_ids"):
            _write_json(folder / "generation_config.json", _generation_config(settings, ends))
        os.replace(folder, path)
    except OSError as error:
        raise BadInput(f"path is {str(path)!r}, which cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: Tensors | Mapping[str, Any], shard_bytes: int) -> set[str]:
    """Write the shards and, if there are several, their index; returns the names of the dtypes met."""
    names = list(tensors)
    shapes = {name: _shape(tensors, name) for name in names}
    dtypes: set[str] = set()
    shards: list[dict[str, int]] = []  # tensor -> bytes
    while names or not shards:
        shard: dict[str, int] = {}
        with open(folder / f"shard-{len(shards)}", "wb") as file:
            writer = SafetensorsWriter(file, {name: shapes[name] for name in names})
            while names:
                array = np.asarray(tensors[names[0]])
                if shard and writer.nbytes + array.nbytes > shard_bytes:
                    break
                dtypes.add(str(array.dtype))
                shard[names[0]] = array.nbytes
                writer.write(names.pop(0), array)
            writer.finish()
        shards.append(shard)
    if len(shards) == 1:
        os.replace(folder / "shard-0", folder / "model.safetensors")
        return dtypes
    places = {}
    for index, shard in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{index}", folder / file_name)
        places |= dict.fromkeys(shard, file_name)
    total = sum(sum(shard.values()) for shard in shards)
    index_file = folder / "model.safetensors.index.json"
    _write_json(index_file, {"metadata": {"total_size": total}, "weight_map": places})
    return dtypes


def _shape(tensors: Tensors | Mapping[str, Any], name: str) -> tuple[int, ...]:
    # A checkpoint's tensors know their shape without being read; arrays carry it.
    if isinstance(tensors, Mapping):
        return tuple(tensors[name].shape)
    return tensors.shape(name)


def _tokenizer_config(config: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    written = {name: special[name] for name in (*_SPECIAL, "add_bos_token", "chat_template") if name in special}
    limit = config.get("max_position_embeddings")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **written,
        **({"model_max_length": limit} if limit else {}),
    }


def _generation_config(config: Mapping[str, Any], ends: Iterable[int]) -> dict[str, Any]:
    ids = {name: config[name] for name in ("bos_token_id", "pad_token_id") if name in config}
    return {**ids, "eos_token_id": list(ends)}
