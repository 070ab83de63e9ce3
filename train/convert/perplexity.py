"""Perplexity of windows of text under a plain forward pass: how good a conversion is before any training."""

from collections.abc import Iterator
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvx.errors import BadInput
from kvx.loop import forward
from kvx.models.build import Model
from kvx.train.data import Documents, Encoding


def windows(encoding: Encoding, documents: Documents, count: int, length: int, most: int = 2) -> Int[np.ndarray, "B T"]:
    """The first `count` windows of `length` tokens, at most `most` of each document, from its beginning.

    Raises:
        BadInput: too little text.
    """

    def cut() -> Iterator[Int[np.ndarray, "T"]]:
        for document in documents:
            ids = encoding(document)
            for start in range(0, min(len(ids) // length, most) * length, length):
                yield ids[start : start + length]

    rows = list(islice(cut(), count))
    if len(rows) < count:
        raise BadInput(f"text has {len(rows)} windows of {length} tokens; allowed: at least {count}")
    return np.stack(rows)


def perplexity(model: Model, rows: Int[np.ndarray, "B T"], batch: int = 8) -> float:
    """exp of the mean negative log-probability of every token after a window's first."""
    sums = [_losses(model, jnp.asarray(rows[start : start + batch])) for start in range(0, len(rows), batch)]
    return float(np.exp(np.sum(np.asarray(sums, np.float64)) / rows[:, 1:].size))


def _losses(model: Model, rows: Int[Array, "B T"]) -> float:
    """Sum of a batch's losses. Not jitted as a whole: layers of equal spec share one compiled body."""
    return float(_cross_entropy(forward(model, rows), rows))


@jax.jit
def _cross_entropy(logits: Float[Array, "B T N"], rows: Int[Array, "B T"]) -> Float[Array, ""]:
    chosen = jnp.take_along_axis(logits[:, :-1], rows[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits[:, :-1], axis=-1) - chosen)
