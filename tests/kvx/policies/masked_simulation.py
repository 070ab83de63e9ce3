"""A dense numpy oracle of eviction: nothing is moved or freed, what a rule evicts is masked in every later step.

This is how H2O's authors simulate their method. Rules see and change `LayerState`s.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tests.kvx.policies.direct import softmax


@dataclass
class LayerState:
    """One layer's whole history: rotated keys and values (G, S, D), and what the rule keeps of it.

    Attributes:
        alive: which tokens the rule has not evicted, (G, S).
        mass: probability that every token has received, mean over the query heads of a group, (G, S).
        column: at the prompt, column sums by query head, (G, R, S).
        last: probabilities of the newest query, (G, R, S); 0 where evicted.
        rows: probabilities of the prompt's queries, (G, R, T, T).
    """

    keys: np.ndarray
    values: np.ndarray
    alive: np.ndarray
    mass: np.ndarray
    column: np.ndarray
    last: np.ndarray
    rows: np.ndarray


class Simulation:
    """One prompt, then tokens one by one, under a rule with `prompt(layers)` and `step(index, layer)`."""

    def __init__(self, model, prompt: np.ndarray, rule):
        self.model, self.rule, self.seen = model, rule, len(prompt)
        self.layers: list[LayerState] = []
        x = model.embed(jnp.asarray(prompt[None]))
        hidden = np.tril(np.ones((len(prompt), len(prompt)), bool))
        for block in model.blocks:
            q, k, v = self._project(block, x, np.arange(len(prompt)))
            logits = np.einsum("grtd,gsd->grts", q, k) * block.spec.scale
            p = softmax(np.where(hidden, logits, -np.inf))
            x = self._finish(block, x, np.einsum("grts,gsd->grtd", p, v))
            column = p.sum(axis=2)
            everyone = np.ones(k.shape[:2], bool)
            self.layers.append(LayerState(k, v, everyone, column.mean(axis=1), column, p[:, :, -1], p))
        rule.prompt(self.layers)

    def step(self, token: int) -> np.ndarray:
        """Logits after one more token."""
        x = self.model.embed(jnp.asarray([[token]], jnp.int32))
        for index, (block, layer) in enumerate(zip(self.model.blocks, self.layers, strict=True)):
            q, k, v = self._project(block, x, np.asarray([self.seen]))
            layer.keys = np.concatenate([layer.keys, k], axis=1)
            layer.values = np.concatenate([layer.values, v], axis=1)
            layer.alive = np.pad(layer.alive, ((0, 0), (0, 1)), constant_values=True)
            logits = np.einsum("grtd,gsd->grts", q, layer.keys) * block.spec.scale
            p = softmax(np.where(layer.alive[:, None, None], logits, -np.inf))
            x = self._finish(block, x, np.einsum("grts,gsd->grtd", p, layer.values))
            layer.last = p[:, :, 0]
            layer.mass = np.pad(layer.mass, ((0, 0), (0, 1))) + layer.last.mean(axis=1)
            self.rule.step(index, layer)
        self.seen += 1
        return np.asarray(self.model.unembed(x[:, 0]))[0]

    def kept(self) -> list[list[list[int]]]:
        """Positions held, by layer and KV head."""
        return [[np.flatnonzero(head).tolist() for head in layer.alive] for layer in self.layers]

    def _project(self, block, x, positions):
        """Rotated queries (G, R, T, D), rotated keys and values (G, T, D), float64."""
        q, k, v = block.project(x)
        spots = jnp.asarray(positions, jnp.int32)[None, :, None]
        q, k = block.rotary(q, spots), block.rotary(k, spots)
        groups, length = block.spec.kv_heads, len(positions)
        q = np.asarray(q[0], np.float64).transpose(1, 0, 2).reshape(groups, -1, length, q.shape[-1])
        return q, *(np.asarray(rows[0], np.float64).transpose(1, 0, 2) for rows in (k, v))

    def _finish(self, block, x, out):
        heads = out.reshape(-1, *out.shape[2:]).transpose(1, 0, 2)[None]
        return block.finish(x, jnp.asarray(heads, jnp.float32))


def kept_by(cache) -> list[list[list[int]]]:
    """Positions that a cache of one row holds, by layer and KV head."""
    return [
        [sorted(int(place) for place in head if place >= 0) for head in np.asarray(store.positions())[0]]
        for store in cache.layers
    ]
