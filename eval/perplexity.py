"""Perplexity of held-out prose through the decode path, so that the cache policy acts on what is predicted."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

import kvx
from kvx.cache import KVCache
from kvx.decoder import Decoder


def perplexities(
    model: Decoder, documents: Int[np.ndarray, "B T"], prompt: int, policies: Sequence[kvx.Policy]
) -> Iterator[tuple[float, KVCache]]:
    """exp of the mean negative log-probability of the tokens after the prompt, policy by policy.

    The prompts are prefilled in one pass for all policies; the rest is forced through the decode path token by token,
    under each policy's cache.

    Args:
        documents: one batch; all of one length.
        prompt: tokens of each document that are prefilled.
        policies: what to measure.

    Yields:
        The perplexity over all rows and forced tokens, and the cache after them.
    """
    forced = documents[:, prompt:]
    logits, caches = kvx.prefill(model, documents[:, :prompt], tuple(policies), max_new_tokens=forced.shape[1])
    assert isinstance(caches, tuple), "a tuple of policies gives a tuple of caches"
    waiting = list(caches)
    del caches
    for policy in policies:
        scores, cache = kvx.teacher_forced(model, forced, waiting.pop(0), policy, logits)
        yield float(jnp.exp(-jnp.mean(scores))), cache
