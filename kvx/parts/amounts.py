"""Amounts: how much to keep, as slots per KV head or as a share of the prompt, told apart when they are built.

Python holds 1 == 1.0 == True, and a static field of a compiled function compares by ==: untagged, `budget=1` and
`budget=1.0` would share one compiled program.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvx.errors import BadInput


@dataclass(frozen=True)
class Slots:
    """A number of slots per KV head, averaged over layers and heads."""

    count: int

    def of(self, lengths: Int[Array, "B"], prompt: int) -> Int[Array, "B"]:
        """Slots for prompts of these lengths."""
        return jnp.full_like(lengths, self.count)

    def most(self, prompt: int) -> int:
        """Slots for the longest prompt of `prompt` tokens."""
        return self.count


@dataclass(frozen=True)
class Share:
    """A share of the prompt in (0, 1], fixed when the prompt ends; at least one slot."""

    share: float

    def of(self, lengths: Int[Array, "B"], prompt: int) -> Int[Array, "B"]:
        """Slots for prompts of these lengths, each at most `prompt`."""
        # A table in float64, since floor(share * n) in float32 loses a slot at some lengths.
        return jnp.asarray(self._floor(np.arange(prompt + 1)), jnp.int32)[jnp.minimum(lengths, prompt)]

    def most(self, prompt: int) -> int:
        """Slots for the longest prompt of `prompt` tokens."""
        return int(self._floor(np.asarray([prompt]))[0])

    def _floor(self, lengths: np.ndarray) -> np.ndarray:
        return np.maximum(1, np.floor(self.share * lengths + 1e-9)).astype(np.int64)


Amount = Slots | Share
LARGEST = 2**31 - 1
"""What an array of int32 holds."""

T = TypeVar("T")


def amount(value: Any, name: str = "budget") -> Amount:
    """The tagged amount a user wrote: an int counts slots, a float in (0, 1] is a share of the prompt.

    Raises:
        BadInput: anything else (zero, negative, NaN, a float above 1, a bool).
    """
    allowed = "allowed: an int of at least 1 (slots per KV head) or a float in (0, 1] (share of the prompt)"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise BadInput(f"{name}={value!r} is not a number; {allowed}")
    if isinstance(value, (int, np.integer)):
        if value < 1:
            raise BadInput(f"{name}={value} is not positive; {allowed}")
        if value > LARGEST:
            raise BadInput(f"{name}={value} is out of range; allowed: an int of at most {LARGEST} (slots per KV head)")
        return Slots(int(value))
    if not (math.isfinite(value) and 0 < value <= 1):
        raise BadInput(f"{name}={value} is out of range; {allowed}")
    return Share(float(value))


def whole(value: Any, name: str, least: int, most: int | None = None) -> int:
    """A checked whole-number hyperparameter.

    Raises:
        BadInput: not an int in [least, most].
    """
    number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if most is None and number and value > LARGEST:
        most = LARGEST
    allowed = f"an int of at least {least}" if most is None else f"an int from {least} to {most}"
    if not number or value < least or (most is not None and value > most):
        raise BadInput(f"{name}={value!r} is out of range; allowed: {allowed}")
    return int(value)


def fraction(value: Any, name: str) -> float:
    """A checked hyperparameter in [0, 1].

    Raises:
        BadInput: not a finite number in [0, 1].
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # NaN fails the comparison
        raise BadInput(f"{name}={value!r} is out of range; allowed: a number from 0 to 1")
    return float(value)


def one_of(value: object, name: str, known: tuple[T, ...]) -> T:
    """A checked choice.

    Raises:
        BadInput: not one of `known`.
    """
    if value not in known or isinstance(value, (bool, float)):  # 2.0 == 2, but would compile and label anew
        raise BadInput(f"{name}={value!r} is not offered; allowed: {', '.join(map(str, known))}")
    return known[known.index(value)]
