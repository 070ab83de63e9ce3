"""Given tokens through the decode path: a cache that is continued, and a text whose probability is asked."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvx.buckets import bucket
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.inputs import check_room, check_rows, checked_prompt
from kvx.layer_by_layer import scan, while_loop
from kvx.lending import takes_cache
from kvx.policy import Policy
from kvx.step import decode


def extend(
    model: Decoder, tokens: Array | np.ndarray, policy: Policy, lengths: Array | np.ndarray | None, cache: KVCache
) -> tuple[Float[Array, "B N"], KVCache]:
    """Feed more tokens to an existing cache through the decode path, so that every policy acts as it would there.

    Returns:
        Logits after each row's last token, and the cache. The given cache is donated.
    """
    tokens, lengths = checked_prompt(model, tokens, lengths, (policy,), 0)
    check_rows(tokens, cache)
    check_room(cache, int(jnp.max(lengths)))
    width = bucket(tokens.shape[1])
    return _extend(model, policy, cache, jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1]))), lengths)


def teacher_forced(
    model: Decoder, tokens: Array | np.ndarray, cache: KVCache, policy: Policy, logits: Float[Array, "B V"]
) -> tuple[Float[Array, "B N"], KVCache]:
    """Log-probability of each given token under the cache before it, fed one by one through the decode path.

    Args:
        tokens: the continuation; its first token is scored by `logits`, which `prefill` returned.
        cache: donated.
    """
    check_room(cache, tokens.shape[1])
    return _teacher_forced(model, policy, cache, jnp.asarray(tokens, jnp.int32), logits)


@takes_cache()
def _extend(model, policy, cache, tokens, lengths):
    def unfinished(state):
        return state[0] < jnp.max(lengths)

    def advance(state):
        step, cache, logits = state
        active = step < lengths
        after, cache = decode(model, tokens[:, step], cache, policy, active)
        return step + 1, cache, jnp.where(active[:, None], after, logits)

    logits = jnp.zeros((tokens.shape[0], model.vocabulary), jnp.float32)
    _, cache, logits = while_loop(unfinished, advance, (jnp.int32(0), cache, logits))
    return logits, cache


@takes_cache()
def _teacher_forced(model, policy, cache, tokens, logits):
    everyone = jnp.ones(tokens.shape[0], bool)

    def advance(carry, token):
        cache, logits = carry
        scored = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        logits, cache = decode(model, token, cache, policy, everyone)
        return (cache, logits), scored

    (cache, _), scores = scan(advance, (cache, logits), tokens.T)
    return scores.T, cache
