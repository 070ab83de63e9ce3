"""The section "kvx_mla" of a config: which layers have latent attention, of what widths and at which frequencies.

Whatever follows from a config (an abstract model, its checks, a saved directory, ahead-of-time compilation) so knows
of latent layers too, beside the source model's own keys:

    "kvx_mla": {"layers": {"0": {"heads": 9, "rank": 64, "rotary": 32, ..., "frequencies": [1.0, ...]}}}
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from kvx.errors import BadInput, unknown
from kvx.models.mla import LatentAttention, LatentConfig

SECTION = "kvx_mla"


@dataclass(frozen=True, eq=False)
class LatentLayer:
    """What one layer's latent attention is, without its weights.

    Attributes:
        config: widths and switches.
        frequencies: radians per position, one per rotary pair, float32.
        magnitude: factor on cos and sin.
    """

    config: LatentConfig
    frequencies: Float[np.ndarray, "P"]
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        pairs = self.config.rotary // 2
        if self.frequencies.shape != (pairs,) or not np.all(np.isfinite(self.frequencies)):
            raise BadInput(
                f"frequencies of latent attention have shape {self.frequencies.shape}: expected {pairs} finite numbers,"
                f" one per pair of rotary={self.config.rotary} channels"
            )
        if not (math.isfinite(self.magnitude) and self.magnitude > 0):
            raise BadInput(f"magnitude={self.magnitude} of latent attention: expected a finite number above 0")

    def attention(
        self, width: int, dtype: np.dtype, window: int | None = None, softcap: float | None = None
    ) -> LatentAttention:
        """The layer's attention, without arrays yet, in a model of this width."""
        return LatentAttention(width, self.config, self.frequencies, self.magnitude, dtype, window, softcap)

    def entry(self) -> dict[str, Any]:
        """As the section writes it; JSON keeps every bit of a float32."""
        frequencies = [float(frequency) for frequency in self.frequencies]
        return dataclasses.asdict(self.config) | {"frequencies": frequencies, "magnitude": float(self.magnitude)}


def latent_layers(config: Mapping[str, Any], layers: int) -> dict[int, LatentLayer]:
    """The latent layers of a config by their index; none if it has no section.

    Args:
        config: as in a Hugging Face config.json.
        layers: how many the model has.

    Raises:
        BadInput: a section that is not what `section` writes, or a layer that the model does not have.
    """
    section = config.get(SECTION)
    if section is None:
        return {}
    entries = section.get("layers") if isinstance(section, Mapping) else None
    if not isinstance(entries, Mapping):
        raise BadInput(f"{SECTION}={str(section)[:80]} in config.json: expected an object with layers by their index")
    found = {}
    for name, entry in entries.items():
        if not (isinstance(name, str) and name.isascii() and name.isdigit() and int(name) < layers):
            raise BadInput(f"{SECTION} in config.json names layer {name!r}: expected 0 to {layers - 1}")
        found[int(name)] = _layer(int(name), entry)
    return found


def section(layers: Mapping[int, LatentLayer]) -> dict[str, Any]:
    """The section that says so."""
    return {"layers": {str(layer): layers[layer].entry() for layer in sorted(layers)}}


def _layer(index: int, entry: Any) -> LatentLayer:
    known = {field.name: field for field in dataclasses.fields(LatentConfig)}
    if not isinstance(entry, Mapping):
        raise BadInput(f"layer {index} of {SECTION} in config.json is {str(entry)[:80]}: expected an object")
    widths = dict(entry)
    frequencies, magnitude = widths.pop("frequencies", None), widths.pop("magnitude", 1.0)
    for name in widths:
        if name not in known:
            raise unknown(f"key of layer {index} of {SECTION} in config.json", str(name), known)
    for name, field in known.items():
        if name not in widths and field.default is dataclasses.MISSING:
            raise BadInput(f"layer {index} of {SECTION} in config.json lacks {name}: expected a number")
        if not _of_kind(field.type, widths.get(name, field.default)):
            kind = getattr(field.type, "__name__", field.type)
            raise BadInput(f"{name}={widths[name]!r} of layer {index} of {SECTION} in config.json: expected {kind}")
    if not isinstance(frequencies, list) or not all(_number(each) for each in frequencies) or not _number(magnitude):
        raise BadInput(f"layer {index} of {SECTION} in config.json: expected a list of frequencies, and a magnitude")
    return LatentLayer(LatentConfig(**widths), np.asarray(frequencies, np.float32), float(magnitude))


def _of_kind(kind: Any, value: Any) -> bool:
    """Whether a value of JSON is what a field of `LatentConfig` takes: a float may be written as an integer."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
