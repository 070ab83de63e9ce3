"""Checked values of a Hugging Face config.json: a wrong one is refused with one sentence that names it.

A missing key and a JSON null mean the same (the default), as they do in Hugging Face's own configuration classes.
"""

import math
from collections.abc import Mapping
from typing import Any

from kvx.errors import BadInput


def integer(
    config: Mapping[str, Any], name: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1
) -> int:
    """`config[name]` as an int in [low, high]; refused if it is missing and there is no default."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise BadInput(f"config.json lacks {name}: expected an integer from {low} to {high}")
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"{name}={value!r} in config.json: expected an integer from {low} to {high}")
    return value


def positive(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """`config[name]` as a finite float above 0; refused if it is missing and there is no default."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise BadInput(f"config.json lacks {name}: expected a finite number above 0")
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise BadInput(f"{name}={value!r} in config.json: expected a finite number above 0")
    return float(value)


def optional_positive(config: Mapping[str, Any], name: str, default: float | None) -> float | None:
    """As `positive`, but an explicit null switches the feature off; only a missing key means the default."""
    return None if config.get(name, default) is None else positive(config, name, default)


def optional_integer(config: Mapping[str, Any], name: str, default: int | None) -> int | None:
    """As `integer`, but an explicit null switches the feature off; only a missing key means the default."""
    return None if config.get(name, default) is None else integer(config, name, default)


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """`config[name]` as a bool."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise BadInput(f"{name}={value!r} in config.json: expected true or false")
    return value


def only(config: Mapping[str, Any], name: str, allowed: Any, architecture: str) -> None:
    """Refuse any `config[name]` but `allowed` (or none): a setting that this architecture's code does not compute."""
    value = config.get(name)
    if value is not None and value != allowed:
        raise BadInput(f"{name}={value!r} in config.json is not supported for {architecture}: expected {allowed!r}")


def heads(config: Mapping[str, Any], default_head_dim: int | None = None) -> tuple[int, int, int]:
    """Query heads, KV heads, head dim; KV heads divide the query heads and the head dim is even."""
    query = integer(config, "num_attention_heads", high=65536)
    kv = integer(config, "num_key_value_heads", query, high=65536)
    if query % kv:
        raise BadInput(f"num_key_value_heads={kv} in config.json: expected a divisor of num_attention_heads={query}")
    width = integer(config, "hidden_size")
    if default_head_dim is None and config.get("head_dim") is None and width % query:
        raise BadInput(f"hidden_size={width} in config.json: expected a multiple of num_attention_heads={query}")
    head_dim = integer(config, "head_dim", default_head_dim or width // query, low=2, high=8192)
    if head_dim % 2:
        raise BadInput(f"head_dim={head_dim} in config.json: expected an even number, which rotary embedding needs")
    return query, kv, head_dim


def layer_windows(
    config: Mapping[str, Any], layers: int, window: int | None, sliding: tuple[bool, ...]
) -> tuple[int | None, ...]:
    """Each layer's sliding window, or None for full attention.

    "layer_types" in the config says which layers slide; without it, `sliding` (one flag a layer) does.
    """
    kinds = config.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list | tuple) or len(kinds) != layers or any(kind not in known for kind in kinds):
            raise BadInput(f"layer_types={kinds!r} in config.json: expected {layers} entries, each one of {known}")
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
    if any(sliding) and window is None:
        raise BadInput("config.json has sliding_attention layers without a sliding_window: expected an integer above 0")
    return tuple(window if slides else None for slides in sliding)
