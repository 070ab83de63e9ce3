"""A ragged batch and a continuation that is forced through the decode path, the same for every policy."""

import numpy as np

import kvx
from tests import tiny

STEPS = 24
LENGTHS = (110, 40, 71)


def model():
    return tiny.model(num_hidden_layers=3)


def forced(rows: int = 3) -> np.ndarray:
    """The continuation."""
    return np.random.default_rng(1).integers(0, 97, (3, STEPS)).astype(np.int32)[:rows]


def run(model, policy, tokens, lengths, continuation, **prefilling):
    """Log-probabilities along the continuation, and the cache after it."""
    logits, cache = kvx.prefill(model, tokens, policy, lengths, max_new_tokens=STEPS, **prefilling)
    scores, cache = kvx.teacher_forced(model, continuation, cache, policy, logits)
    return np.asarray(scores), cache
