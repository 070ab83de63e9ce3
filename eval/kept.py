"""Which tokens of a prompt a cache still holds: by layer and KV head, and of the evidence."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from kvx.cache import KVCache


def kept(cache: KVCache, row: int, tokens: int) -> Bool[np.ndarray, "L G T"]:
    """Whether a row's prompt tokens are held, by the true positions of the slots."""
    layers = [np.asarray(layer.positions())[row] for layer in cache.layers]
    held = np.zeros((len(layers), max(map(len, layers)), tokens), bool)
    for mask, layer in zip(held, layers, strict=True):
        for head, positions in enumerate(layer):
            mask[head, positions[(positions >= 0) & (positions < tokens)]] = True
    return held


def evidence_kept(cache: KVCache, row: int, places: Sequence[tuple[int, int]]) -> float | None:
    """Share of the evidence's tokens that are held, mean over layers and KV heads; None without evidence.

    Args:
        places: first and one past the last token of each piece.
    """
    if not places:
        return None
    inside = np.concatenate([np.arange(first, last) for first, last in places])
    return float(kept(cache, row, int(inside.max()) + 1)[:, :, inside].mean())
