"""Passkeys along the way: does a model, the prompt and the key so far given, find every digit of a hidden number?

One plain pass judges a row, so that it can be asked at every evaluation of a training run; `kvx.train.judging` asks the
finished student to generate its answers to the same prompts, from its own cache.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvx.decoder import Decoder
from kvx.mesh import Placement
from kvx.prose import Prose
from kvx.train.batch import Batch
from kvx.train.forward import run
from kvx.train.losses import by_chunks, next_tokens

CHUNK = 1024
"""Tokens whose logits exist at a time."""


def prompts(tokenizer: Any, text: str, length: int, count: int, seed: int = 0) -> Sequence[Any]:
    """Samples of the passkey workload, without a chat template.

    Args:
        text: to hide numbers in.
        length: tokens of a prompt at most.
        count: of prompts; their depths cover the text evenly.

    Raises:
        BadInput: a length that not even the question fits in; a text without a paragraph of running text.
    """
    from kvx.eval.prompts import Frame
    from kvx.eval.tasks.registry import find
    from kvx.eval.tasks.source import Source

    return find("passkey").make(Source(tokenizer, Prose("held-out text", text), Frame()), length, count, seed)


def passkeys(tokenizer: Any, samples: Sequence[Any], rows: int) -> list[Batch]:
    """Prompts with their answers behind them, of which only the answers count.

    Args:
        samples: by `prompts`.
        rows: of a batch; the last one is filled up with rows of which nothing counts.
    """
    from kvx.eval.prompts import Frame

    frame, given = Frame(), []
    for sample in samples:
        asked = sample.questions[0]
        prompt = frame.context(tokenizer, sample) + frame.question(tokenizer, sample, asked)
        given.append((prompt, tokenizer.encode(" " + asked.answers[0], add_special=False)))
    width = max(len(prompt) + len(key) for prompt, key in given)
    shape = (-(-len(given) // rows) * rows, width)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, (prompt, key) in enumerate(given):
        tokens[row, : len(prompt) + len(key)] = prompt + key
        mask[row, len(prompt) : len(prompt) + len(key)] = True
    # What pads a row comes after all that counts, where causal attention does not look.
    places = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
    return [
        Batch(tokens[first : first + rows], np.ones_like(places), places, mask[first : first + rows], packed=False)
        for first in range(0, len(tokens), rows)
    ]


def recalled(
    model: Decoder, batch: Batch, placement: Placement | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Share of rows whose counted tokens are all the likeliest, and how many rows have any; 0 of 0 is 0."""
    targets, counted = next_tokens(batch.tokens, batch.segments, batch.mask)
    segments = batch.segments if batch.packed else None
    last = run(model, batch.tokens, segments, batch.positions, placement=placement).last
    right = by_chunks(lambda x, goal: jnp.argmax(model.unembed(x), axis=-1) == goal, (last, targets), CHUNK)
    asked = jnp.any(counted, axis=1)
    known = jnp.sum(asked & jnp.all(right | ~counted, axis=1), dtype=jnp.float32)
    rows = jnp.sum(asked, dtype=jnp.float32)
    return known / jnp.maximum(rows, 1), rows
