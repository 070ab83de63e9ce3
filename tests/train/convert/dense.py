"""A dense numpy forward of one layer's attention, as the split says it: the oracle of conversions, in float64."""

import numpy as np


def positions_apart(length: int) -> np.ndarray:
    """Query position less key position."""
    return np.arange(length)[:, None] - np.arange(length)


def turned(query: np.ndarray, key: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Re sum_j conj(q_j) k_j exp(-i theta_j (t - t')) of complex (T, P) and (T, P): (T, T)."""
    angles = np.exp(-1j * positions_apart(len(query))[..., None] * frequencies)
    return np.einsum("tp,sp,tsp->ts", query.conj(), key, angles).real


def attention(logits: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal softmax attention of one head."""
    masked = np.where(positions_apart(len(logits)) >= 0, logits, -np.inf)
    weights = np.exp(masked - masked.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ values


def source_logits(source, x: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """Logits (H, T, T) of ordinary attention over x (T, X); pairs that are not `kept` (G, P) stay unrotated."""
    kept = np.ones((source.kv_heads, source.head_dim // 2), bool) if kept is None else kept
    found = []
    for head in range(source.heads):
        g = head // source.group
        query, key = x @ source.query_pairs[head].T, x @ source.key_pairs[g].T
        found.append(turned(query, key, np.where(kept[g], source.frequencies, 0)))
    return source.scale * source.magnitude**2 * np.stack(found)


def split_logits(source, split, x: np.ndarray) -> np.ndarray:
    """Logits (H, T, T) of a split, nothing compressed."""
    found = []
    for head in range(source.heads):
        block = head // (source.heads // len(split.rotary_key))
        query, key = x @ split.rotary_query[head].T, x @ split.rotary_key[block].T
        rotary = split.magnitude**2 * turned(query, key, split.frequencies[block])
        content = (x @ split.content_query[head].T) @ (split.lift[head] @ split.content_key @ x.T)
        found.append(rotary + content)
    return source.scale * np.stack(found)


def output(source, logits: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What the layer adds to the residual stream, from logits (H, T, T)."""
    heads = [attention(logits[h], x @ source.value[h // source.group].T) @ source.out[h] for h in range(source.heads)]
    return sum(heads) + (0 if source.out_bias is None else source.out_bias)
