"""Sampling: from logits to the next token, by explicit keys that depend on seed and true position only."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from kvx.errors import BadInput
from kvx.parts.amounts import fraction, whole
from kvx.pytree import pytree


@pytree
class Sampling:
    """How the next token is chosen. None switches a filter off; values are leaves, so changing one compiles nothing.

    Attributes:
        temperature: logits are divided by it; None: greedy.
        top_k: only the k most likely tokens.
        top_p: the fewest most likely tokens whose probability reaches p (Holtzman et al. 2020).
        min_p: only tokens at least this share as likely as the most likely one.
        repetition_penalty: logits of tokens already in the text are divided (if positive) or multiplied by it
            (Keskar et al. 2019).
    """

    temperature: Float[Array, ""] | float | None = None
    top_k: Int[Array, ""] | int | None = None
    top_p: Float[Array, ""] | float | None = None
    min_p: Float[Array, ""] | float | None = None
    repetition_penalty: Float[Array, ""] | float | None = None


GREEDY = Sampling()
"""The most likely token, always."""


def sampling(
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Sampling:
    """A checked `Sampling`; temperature 0 is greedy.

    Raises:
        BadInput: a value out of range.
    """
    for name, value in (("temperature", temperature), ("repetition_penalty", repetition_penalty)):
        least = 0.0 if name == "temperature" else 1e-6
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= least):
            raise BadInput(f"{name}={value!r} is out of range; allowed: a finite number of at least {least:g}")
    filters: dict[str, Any] = {
        "top_k": None if top_k is None else jnp.int32(whole(top_k, "top_k", least=1)),
        "top_p": None if top_p is None else jnp.float32(fraction(top_p, "top_p")),
        "min_p": None if min_p is None else jnp.float32(fraction(min_p, "min_p")),
    }
    penalty = None if repetition_penalty is None else jnp.float32(repetition_penalty)
    return Sampling(jnp.float32(temperature) if temperature > 0 else None, **filters, repetition_penalty=penalty)


def next_token(
    logits: Float[Array, "B N"],
    rule: Sampling,
    seeds: Key[Array, "B"],
    positions: Int[Array, "B"],
    said: Bool[Array, "B N"] | None,
) -> Int[Array, "B"]:
    """The next token of every row.

    Args:
        seeds: (B,) keys; a row's draw depends on its seed and its true position, never on its place in the batch.
        said: tokens already in each row's text, for the repetition penalty.
    """
    logits = penalised(logits, rule, said)
    if rule.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = allowed(logits / rule.temperature, rule)
    keys = jax.vmap(jax.random.fold_in)(seeds, positions)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def law(logits: Float[Array, "B N"], rule: Sampling, said: Bool[Array, "B N"] | None) -> Float[Array, "B N"]:
    """The probabilities from which `next_token` draws: everything the rule asks for applied; one-hot if greedy."""
    logits = penalised(logits, rule, said)
    if rule.temperature is None:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jax.nn.softmax(allowed(logits / rule.temperature, rule), axis=-1)


def penalised(logits: Float[Array, "B N"], rule: Sampling, said: Bool[Array, "B N"] | None) -> Float[Array, "B N"]:
    """Logits less favourable to tokens that the text holds already."""
    if rule.repetition_penalty is None or said is None:
        return logits
    weaker = jnp.where(logits > 0, logits / rule.repetition_penalty, logits * rule.repetition_penalty)
    return jnp.where(said, weaker, logits)


def allowed(logits: Float[Array, "B N"], rule: Sampling) -> Float[Array, "B N"]:
    """Logits with everything that a filter excludes at -inf; the most likely token always stays."""
    if rule.min_p is not None:
        logits = jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(rule.min_p), logits, -jnp.inf)
    if rule.top_k is None and rule.top_p is None:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    least = jnp.full(logits.shape[:1], -jnp.inf, logits.dtype)
    if rule.top_k is not None:
        last = jnp.minimum(rule.top_k, logits.shape[-1]) - 1
        least = jnp.maximum(least, descending[:, last])
    if rule.top_p is not None:
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        reached = jnp.where(before < jnp.maximum(rule.top_p, 1e-9), descending, jnp.inf)
        least = jnp.maximum(least, jnp.min(reached, axis=-1))
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def row_keys(seed: int | Sequence[int], batch: int) -> Key[Array, "B"]:
    """Each row's key, from one seed for all rows or one for each."""
    seeds = np.broadcast_to(np.asarray(seed, np.uint32), (batch,))
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def said_tokens(vocabulary: int, tokens: np.ndarray, lengths: Any) -> Bool[Array, "B N"]:
    """Which tokens each row's text holds."""
    said = np.zeros((len(tokens), vocabulary), bool)
    for row, text in enumerate(tokens):
        said[row, text[: len(text) if lengths is None else int(lengths[row])]] = True
    return jnp.asarray(said)


def with_said(said: Bool[Array, "B N"] | None, token: Int[Array, "B"]) -> Bool[Array, "B N"] | None:
    """Which tokens the text holds with one more; None: nobody asks."""
    return said if said is None else said.at[jnp.arange(len(token)), token].set(True)
