"""Perplexity of held-out prose through the decode path, so that the cache policy acts on what is predicted."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import kvx
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.eval.shared_pass import prefill_each
from kvx.eval.side_by_side import side_by_side


def perplexities(
    model: Decoder, documents: Int[np.ndarray, "B T"], prompt: int, policies: Sequence[kvx.Policy]
) -> Iterator[tuple[float, int]]:
    """exp of the mean negative log-probability of the tokens after the prompt, policy by policy.

    The prompts are prefilled in one pass for all policies; the rest is forced through the decode path token by token,
    under each policy's cache.

    Args:
        documents: one batch; all of one length.
        prompt: tokens of each document that are prefilled.
        policies: what to measure.

    Yields:
        The perplexity over all rows and forced tokens, and the cache's bytes.
    """
    forced = documents[:, prompt:]
    started = prefill_each(model, documents[:, :prompt], policies, forced.shape[1])

    def one(policy: kvx.Policy, start: tuple[Float[Array, "B N"], KVCache]) -> tuple[float, int]:
        logits, cache = start
        nbytes = cache.nbytes
        scores, _ = kvx.teacher_forced(model, forced, cache, policy, logits)
        return float(jnp.exp(-jnp.mean(scores))), nbytes

    yield from side_by_side(model, one, policies, started)
