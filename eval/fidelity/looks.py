"""Looks at what the layers of a decode step read (`kvx.step.Look`): what is attended to most, and the gap to full."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.pytree import pytree, static
from kvx.query import Query


@pytree
class MostAttended:
    """True positions of the tokens that each query head attends to most, -1 where it sees fewer than `most`.

    Attributes:
        most: how many; of a shorter store, all.
    """

    most: int = static()

    def at(self, layer: int) -> "MostAttended":
        return self

    def __call__(self, store: Any, query: Query, out: Float[Array, "B G R 1 V"]) -> Int[Array, "B H K"]:
        chances = store.probabilities(query, store.read(query).lse)[..., 0, :]
        values, slots = jax.lax.top_k(chances, min(self.most, chances.shape[-1]))
        positions = jnp.take_along_axis(store.positions()[:, :, None], slots, axis=-1)
        found = jnp.where(values > 0, positions, -1)
        return found.reshape(len(found), -1, found.shape[-1])


@pytree
class Gap:
    """What lies between one layer's attention under a policy and under the full cache, for one query a row; by head.

    Attributes:
        distance: squared L2 distance of the two outputs.
        size: squared L2 norm of the full cache's.
        found: of the tokens asked for, those that the policy's store holds and reads.
        asked: how many were asked for.
    """

    distance: Float[Array, "*T B H"]
    size: Float[Array, "*T B H"]
    found: Int[Array, "*T B H"]
    asked: Int[Array, "*T B H"]


@pytree
class Gaps:
    """The gap of every layer.

    Attributes:
        full: the full cache's stores; tokens later than the query may be in them.
        wanted: true positions of the tokens asked for, -1 for none.
    """

    full: tuple[Any, ...]
    wanted: tuple[Int[Array, "B H K"], ...]

    def at(self, layer: int) -> "Gaps":
        return Gaps((self.full[layer],), (self.wanted[layer],))

    def __call__(self, store: Any, query: Query, out: Float[Array, "B G R 1 V"]) -> Gap:
        (full,), (wanted,) = self.full, self.wanted
        part = full.read(query)
        rows = out.shape[:3]
        # A slot that a sparse store did not read has probability 0.
        read = store.probabilities(query, part.lse)[..., 0, :] > 0
        wanted = wanted.reshape(*rows, -1)
        same = wanted[..., None] == store.positions()[:, :, None, None]
        there = jnp.any(same & read[..., None, :], axis=-1) & (wanted >= 0)

        def by_head(array: Array) -> Array:
            return array.reshape(rows[0], -1)

        return Gap(
            by_head(jnp.sum((out - part.out) ** 2, axis=(3, 4))),
            by_head(jnp.sum(part.out**2, axis=(3, 4))),
            by_head(jnp.sum(there, axis=-1, dtype=jnp.int32)),
            by_head(jnp.sum(wanted >= 0, axis=-1, dtype=jnp.int32)),
        )
