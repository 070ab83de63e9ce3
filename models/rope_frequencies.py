"""Rotary frequencies of a checkpoint: the base rule and the published ways to stretch it to longer contexts.

Every rule turns theta_i = base^(-2i / D), i < D / 2 (Su et al. 2021, equation 15), into the frequencies really used;
they are computed once, in float64, and stay fixed, so that a rotated key never has to be rotated again.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from kvx.errors import BadInput
from kvx.models.config_values import integer, positive

Frequencies = Float[np.ndarray, "P"]
Settings = Mapping[str, Any]


def rope_frequencies(
    config: Settings, head_dim: int, base: float, layer_type: str | None = None
) -> tuple[Frequencies, float]:
    """The frequencies (head_dim / 2,) float32 and the factor on cos and sin that a Hugging Face config asks for.

    Args:
        config: reads "rope_theta" and "rope_scaling" (files written before transformers 5) or "rope_parameters", and
            a GGUF file's "rope_factors".
        head_dim: width D of a head; all of it is rotated.
        base: the architecture's default for "rope_theta".
        layer_type: the key into "rope_parameters" where each kind of layer has its own entry (Gemma 3).

    Raises:
        BadInput: an unknown rule, a value out of range, or a rule whose frequencies depend on the current length.
    """
    settings = rope_settings(with_plain_rope_factors(config), base, layer_type)
    kind = settings["rope_type"]
    if kind == "dynamic" or (kind == "longrope" and settings.get("short_factor") != settings.get("long_factor")):
        raise BadInput(
            f"rope_type={kind!r} in config.json is not supported: its frequencies change with the length of the text, "
            f"and keys in a cache would have to be rotated again; known: {', '.join(sorted(RULES))}"
        )
    if kind not in RULES:
        raise BadInput(f"rope_type={kind!r} in config.json: expected one of {', '.join(sorted(RULES))}")
    if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise BadInput(
            f"partial_rotary_factor={settings['partial_rotary_factor']!r} in config.json is not supported: expected 1"
        )
    base = positive(settings, "rope_theta")
    if base <= 1:
        raise BadInput(f"rope_theta={base} in config.json: expected a number above 1")
    theta = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    frequencies, magnitude = RULES[kind](theta, settings)
    return frequencies.astype(np.float32), float(magnitude)


def rope_settings(config: Settings, base: float, layer_type: str | None = None) -> dict[str, Any]:
    """One flat dict with "rope_type", "rope_theta" and the rule's own values, whichever spelling the config uses."""
    given = config.get("rope_parameters") or {}
    if layer_type is not None and layer_type in given:
        given = given[layer_type]
    scaling = config.get("rope_scaling") or {}
    if not isinstance(given, Mapping) or not isinstance(scaling, Mapping):
        raise BadInput(f"rope_scaling={scaling or given!r} in config.json: expected an object with a rope_type")
    settings = {"rope_theta": config.get("rope_theta") or base, "context": integer(config, "max_position_embeddings")}
    settings |= {key: value for source in (given, scaling) for key, value in source.items() if value is not None}
    settings["rope_type"] = str(settings.get("rope_type") or settings.get("type") or "default")
    original = config.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    settings["original_max_position_embeddings"] = original or settings["context"]
    return settings


def default(theta: Frequencies, settings: Settings) -> tuple[Frequencies, float]:
    """theta_i as it is."""
    return theta, 1.0


def linear(theta: Frequencies, settings: Settings) -> tuple[Frequencies, float]:
    """theta_i / factor: positions squeezed by `factor` (position interpolation, Chen et al. 2023, equation 4)."""
    return theta / positive(settings, "factor"), 1.0


def llama3(theta: Frequencies, settings: Settings) -> tuple[Frequencies, float]:
    """Long waves squeezed by `factor`, short ones kept, a ramp between (Llama 3.1).

    With r = original context / wavelength, the number of turns within the original context:
    theta_i * (s + (1 - s) / factor), where s = (r - low) / (high - low) clipped to [0, 1].
    """
    factor, low, high = (positive(settings, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise BadInput(f"high_freq_factor={high} in config.json: expected a number above low_freq_factor={low}")
    turns = integer(settings, "original_max_position_embeddings") * theta / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return theta * (keep + (1 - keep) / factor), 1.0


def yarn(theta: Frequencies, settings: Settings) -> tuple[Frequencies, float]:
    """As `llama3`, but the ramp is linear in the channel index, and logits are sharpened (YaRN, Peng et al. 2023).

    The ramp keeps channels that turn more than beta_fast times within the original context and squeezes those that
    turn less than beta_slow times; cos and sin are multiplied by 0.1 ln(factor) + 1 (section 3.4), or by
    "attention_factor" where the config gives it.
    """
    pairs, base = len(theta), positive(settings, "rope_theta")
    original = integer(settings, "original_max_position_embeddings")
    factor = positive(settings, "factor", integer(settings, "context") / original)

    def channel(turns: float) -> float:
        """The (fractional) channel that turns this often within the original context."""
        return pairs * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first, last = channel(positive(settings, "beta_fast", 32.0)), channel(positive(settings, "beta_slow", 1.0))
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    squeeze = np.clip((np.arange(pairs) - first) / (last - first or 0.001), 0, 1)
    return theta * (1 - squeeze + squeeze / factor), _yarn_magnitude(factor, settings)


def _yarn_magnitude(factor: float, settings: Settings) -> float:
    def sharpen(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if settings.get("attention_factor") is not None:
        return positive(settings, "attention_factor")
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return sharpen(positive(settings, "mscale")) / sharpen(positive(settings, "mscale_all_dim"))
    return sharpen(1.0)


def given_factors(theta: Frequencies, settings: Settings) -> tuple[Frequencies, float]:
    """theta_i / factors_i: LongRoPE (Ding et al. 2024) with one list for short and long texts, its only static form."""
    factors = settings.get("short_factor")
    numbers = isinstance(factors, list) and all(isinstance(factor, int | float) for factor in factors)
    divisors = np.asarray(factors if numbers else [], dtype=np.float64)
    if divisors.shape != theta.shape or not np.all(np.isfinite(divisors) & (divisors > 0)):
        raise BadInput(f"rotary factors in config.json: expected a list of {len(theta)} finite numbers above 0")
    if settings.get("attention_factor") is not None:
        return theta / divisors, positive(settings, "attention_factor")
    original = integer(settings, "original_max_position_embeddings", low=2)
    stretch = positive(settings, "factor", integer(settings, "context") / original)
    return theta / divisors, math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def with_plain_rope_factors(config: Settings) -> dict[str, Any]:
    """The config with a GGUF file's "rope_factors" spelled as Hugging Face can: LongRoPE with equal lists.

    A GGUF file stores what its rule (Llama 3) came to, a divisor for each frequency, not the rule itself.
    """
    plain = dict(config)
    factors = plain.pop("rope_factors", None)
    if factors is None:
        return plain
    if plain.get("rope_scaling"):
        raise BadInput("config.json has both rope_factors and rope_scaling: expected one of them")
    plain["rope_scaling"] = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": integer(config, "max_position_embeddings"),
    }
    return plain


RULES: dict[str, Callable[[Frequencies, Settings], tuple[Frequencies, float]]] = {
    "default": default,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": given_factors,
}
