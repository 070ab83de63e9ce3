"""One pass over a prompt for all policies that can share it; the others run alone."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int

import kvx
from kvx.cache import KVCache
from kvx.decoder import Decoder


def prefill_each(
    model: Decoder,
    tokens: Int[np.ndarray, "B T"],
    policies: Sequence[kvx.Policy],
    max_new_tokens: int,
    lengths: Int[np.ndarray, "B"] | None = None,
) -> list[tuple[Float[Array, "B N"], KVCache]]:
    """Logits after the prompt and the cache, for every policy in order.

    A policy that changes what later layers compute (`Policy.alone`) has its own logits; all others share them, and the
    time of the pass.
    """
    together = [policy for policy in policies if not policy.alone]
    shared = iter(())
    if together:
        logits, caches = kvx.prefill(model, tokens, tuple(together), lengths, max_new_tokens=max_new_tokens)
        assert isinstance(caches, tuple), "a tuple of policies gives a tuple of caches"
        shared = ((logits, cache) for cache in caches)
    return [
        kvx.prefill(model, tokens, policy, lengths, max_new_tokens=max_new_tokens) if policy.alone else next(shared)
        for policy in policies
    ]
