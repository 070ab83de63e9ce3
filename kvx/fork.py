"""Forking: a cache of some rows becomes one of several copies of each, which share what they can."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from kvx.cache import KVCache
from kvx.errors import BadInput
from kvx.parts.amounts import whole

Start = TypeVar("Start")


def fork(start: Start, copies: int) -> Start:
    """Continue every row of a batch in several ways: row b becomes rows b * copies to (b + 1) * copies - 1.

        start = kvx.fork(kvx.prefill(model, tokens, policy), 8)
        result = kvx.generate(model, tokens, policy=policy, start=start, sampling=rule, seed=range(8))

    Under a policy that ends in `paged`, copies share the pages of what came before, which are neither copied nor
    changed, and are read once for all of them (Hydragen); each gets pages of its own for what follows. A fork of a fork
    shares in levels. Every other store cannot tell what it will still change, so its arrays are repeated. The given
    cache stays as it is and may be used again: what a fork shares is not donated with it.

    Args:
        start: a cache, or the logits and cache that `kvx.prefill` returned.
        copies: of each row.

    Raises:
        BadInput: no cache, or copies that are not a positive whole number.
    """
    whole(copies, "copies", least=1)
    cache = start[-1] if isinstance(start, tuple) else start
    if not isinstance(cache, KVCache):
        raise BadInput(f"start is of type {type(cache).__name__}; allowed: a cache, or what kvx.prefill returns")
    rows = len(cache.next)

    def put(node: Any) -> Any:
        if hasattr(node, "fork"):
            return node.fork(copies)
        # Copied, since a cache is donated. Weights that a store carries along may happen to be as long as there are
        # rows.
        if _held_whole(node) or node.shape[:1] != (rows,):
            return jax.tree.map(jnp.copy, node)
        return jnp.repeat(node, copies, axis=0)

    return jax.tree.map(put, start, is_leaf=lambda node: hasattr(node, "fork") or _held_whole(node))


def _held_whole(node: Any) -> bool:
    return getattr(type(node), "held_whole", False)
