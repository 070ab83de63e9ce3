"""A decode step under observation: the spine's layers, with a look at what each of them read before it goes on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.cache import ENDLESS, KVCache
from kvx.context import Context, Spec
from kvx.decoder import Decoder
from kvx.evidence import GENERATED
from kvx.kernels.merge_partials import Partial
from kvx.loop import decode_layer, marked, project
from kvx.mesh import place_cache, place_rows, placement_of
from kvx.policy import Layer, Policy
from kvx.pytree import pytree
from kvx.query import Query, to_heads

Look = Callable[[int, Any, Query, Float[Array, "B G R 1 V"]], Any]
"""What is kept of one layer: from its index, the store as it was read, the query, and the layer's attention output."""


@pytree
class _Reading(Policy):
    """A policy that hands up the layers, beside its own carry, the store that it read."""

    def read(self, store: Any, query: Query, carry: Any, context: Context) -> tuple[Partial, Any]:
        part, carry = super().read(store, query, carry, context)
        return part, (carry, store)


def observed_step(
    model: Decoder, token: Int[Array, "B"], cache: KVCache, policy: Policy, look: Look
) -> tuple[Float[Array, "B N"], KVCache, list[Any]]:
    """As `kvx.loop.decode` with every row active, and what `look` makes of each layer.

    A store is seen after the new token has been appended and before anything is evicted: as the layer's attention saw
    it.

    Returns:
        float32 logits, the cache after the step, and every layer's look.
    """
    placement = placement_of(model)
    tokens = place_rows(placement, token[:, None])
    x, layers = model.embed(tokens), len(model.blocks)
    positions, seen = cache.next[:, None], cache.next + 1
    marks = {"id": tokens, "label": jnp.full_like(tokens, GENERATED)}
    storage, states, carry, looks = cache.storage, [], None, []
    for index, (block, where) in enumerate(zip(model.blocks, cache.places, strict=True)):
        context = Context(jnp.int32(index), cache.next, Spec(block.spec, layers, prompt=0, shortest=0, room=0))
        here = policy.at(index, layers)
        query, fresh = project(block, x, positions)
        wanted = {name: marks[name] for name in here.observe(prefill=False).marks}
        fresh = here.stats(marked(fresh, wanted), None, context)
        layer = Layer(where.load(storage), cache.states[index])
        reading = _Reading(here.stages, here.text)
        out, layer, (carry, store) = decode_layer(reading, layer, query, fresh, carry, seen, context)
        looks.append(look(index, store, query, out))
        layer = place_cache(placement, layer, len(tokens), block.spec.kv_heads)
        storage = where.save(storage, layer.store)
        states.append(layer.states)
        x = block.finish(x, to_heads(out).astype(x.dtype))
    room = cache.room - jnp.where(cache.room == ENDLESS, 0, 1)
    return model.unembed(x)[:, 0], KVCache(storage, cache.places, tuple(states), seen, room), looks


def most_attended(store: Any, query: Query, most: int) -> Int[Array, "B H K"]:
    """True positions of the tokens that each query head attends to most, -1 where it sees fewer than `most`."""
    chances = store.probabilities(query, store.read(query).lse)[..., 0, :]
    values, slots = jax.lax.top_k(chances, min(most, chances.shape[-1]))
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


def gap(store: Any, query: Query, out: Float[Array, "B G R 1 V"], full: Any, wanted: Int[Array, "B H K"]) -> Gap:
    """One layer's gap.

    Args:
        store: the policy's, as it was read.
        out: the policy's attention output.
        full: the full cache's store of the layer; tokens later than the query may be in it.
        wanted: true positions, -1 for none.
    """
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
