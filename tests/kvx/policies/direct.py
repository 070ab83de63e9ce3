"""Tokens, evidence and contexts made by hand, so that a policy's choice can be tested without a model."""

import jax.numpy as jnp
import numpy as np

from kvx.context import Context, Spec
from kvx.decoder import AttentionSpec
from kvx.evidence import Evidence
from kvx.kernels.prefill_attention.columns import SUM
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.tokens import Tokens


def rotary(dim: int) -> Rotary:
    """The usual rotation with base 10000."""
    return Rotary(jnp.asarray(10000.0 ** (-np.arange(0, dim, 2) / dim), jnp.float32))


def tokens(
    heads: int, length: int, dim: int = 8, seed: int = 0, keys=None, values=None, rotated: bool = True
) -> Tokens:
    """One row of random tokens at positions 0 to length - 1, or with the given keys and values (G, T, D)."""
    random = np.random.default_rng(seed)
    made = [random.standard_normal((1, heads, length, dim)).astype(np.float32) for _ in range(2)]
    given = [
        own if rows is None else np.asarray(rows, np.float32)[None]
        for own, rows in zip(made, (keys, values), strict=True)
    ]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (1, heads, length))
    return Tokens(*map(jnp.asarray, (*given, positions)), rotary(given[0].shape[-1]), rotated=rotated)


def context(length: int, layer: int = 0, layers: int = 1, heads: int = 1, dim: int = 8, room: int = 16) -> Context:
    """A row of `length` tokens that fill the prompt's bucket."""
    spec = Spec(attention(heads, heads, dim), layers, length, 1, room)
    return Context(jnp.int32(layer), jnp.asarray([length], jnp.int32), spec)


def attention(heads: int, kv_heads: int, dim: int) -> AttentionSpec:
    """Plain attention."""
    return AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5)


def evidence(length: int, rows=None, columns=None) -> Evidence:
    """Rows (G, R, W, S) of probabilities and column sums (G, R, S), about one row of `length` tokens."""
    return Evidence(
        seen=jnp.asarray([length], jnp.int32),
        rows=None if rows is None else jnp.asarray(rows, jnp.float32)[None],
        columns={} if columns is None else {SUM: jnp.asarray(columns, jnp.float32)[None]},
    )


def query(heads: int, kv_heads: int, position: int, dim: int = 8, seed: int = 1) -> Query:
    """One random query of every head at a true position."""
    raw = np.random.default_rng(seed).standard_normal((1, 1, heads, dim)).astype(np.float32)
    spot = jnp.asarray([[position]], jnp.int32)
    return Query.from_heads(jnp.asarray(raw), spot, rotary(dim), attention(heads, kv_heads, dim))


def kept(policy, some: Tokens, seen: Evidence, where: Context) -> np.ndarray:
    """Mask (G, T) of what a policy keeps of one row."""
    return np.asarray(policy.select(some, seen, where)[1])[0]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attend(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Attention of one query per head (G, R, D) over keys and values (G, S, D)."""
    logits = np.einsum("grd,gsd->grs", queries, keys) * queries.shape[-1] ** -0.5
    return np.einsum("grs,gsd->grd", softmax(logits), values)
