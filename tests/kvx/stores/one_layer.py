"""One layer's random tokens and queries for tests of stores, and attention over what a store stands for, in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from kvx.decoder import AttentionSpec
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.tokens import Tokens

WIDTH, HEADS, GROUP = 32, 2, 2
SPEC = AttentionSpec(heads=HEADS * GROUP, kv_heads=HEADS, key_dim=WIDTH, value_dim=WIDTH, scale=WIDTH**-0.5)


def rotary() -> Rotary:
    return Rotary(jnp.asarray(1e4 ** -(np.arange(WIDTH // 2) / (WIDTH // 2)), jnp.float32), jnp.float32(1.0))


def tokens(positions, seed: int = 0, **stats) -> Tokens:
    """Rotated random tokens at positions (B, T), the same for every head; channels differ in size, as real keys do."""
    positions = np.asarray(positions, np.int32)
    random = np.random.default_rng(seed)
    shape = (positions.shape[0], HEADS, positions.shape[1], WIDTH)
    sizes = np.exp(np.random.default_rng(9).normal(size=WIDTH))
    keys, values = random.normal(size=shape) * sizes, random.normal(size=shape)
    places = jnp.asarray(np.broadcast_to(positions[:, None], shape[:3]))
    stats = {name: jnp.asarray(stat, jnp.float32) for name, stat in stats.items()}
    return Tokens(jnp.asarray(keys, jnp.float32), jnp.asarray(values, jnp.float32), places, rotary(), stats)


def query(positions, seed: int = 1) -> Query:
    """Random queries at positions (B, T)."""
    positions = np.asarray(positions, np.int32)
    raw = np.random.default_rng(seed).normal(size=(positions.shape[0], HEADS, GROUP, positions.shape[1], WIDTH))
    return Query(jnp.asarray(raw, jnp.float32), jnp.asarray(positions), rotary(), SPEC)


def attention(query: Query, keys, values, positions):
    """Outputs, log-sum-exps and probabilities over dense contents, float64."""
    q, keys, values = (np.asarray(array, np.float64) for array in (query.rotated, keys, values))
    positions, at = np.asarray(positions), np.asarray(query.positions)
    logits = SPEC.scale * np.einsum("bgrtd,bgcd->bgrtc", q, keys)
    seen = (positions[:, :, None, :] >= 0) & (positions[:, :, None, :] <= at[:, None, :, None])
    weights = np.where(seen[:, :, None], np.exp(logits), 0.0)
    total = weights.sum(-1, keepdims=True)
    probabilities = weights / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        return np.einsum("bgrtc,bgcv->bgrtv", probabilities, values), np.log(total[..., 0]), probabilities


def copies(step, store, least: int = 0) -> int:
    """Copies of arrays shaped like the store's keys, values or codes in a step compiled with the store donated.

    Args:
        least: entries of the arrays that count; less is not cache-sized.
    """
    # Flat leaves, since `lower` would rebuild a store of descriptions, which its checked shapes refuse.
    leaves, tree = jax.tree.flatten(store)
    text = jax.jit(lambda leaves: step(tree.unflatten(leaves)), donate_argnums=0).lower(leaves).compile().as_text()
    shapes = {",".join(map(str, leaf.shape)) for leaf in leaves if leaf.ndim == 4 and leaf.size >= least}
    return sum(shape in shapes for shape in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text))
