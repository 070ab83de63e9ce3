"""The pair store: two neighbouring layers in one storage, which share a direction for every token (MiniCache)."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.kernels.decode_attention import decode_probabilities, ungroup
from kvx.kernels.logits import softmax_rows, visible
from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.places import place
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stores.base import nbytes
from kvx.stores.dense import Dense
from kvx.stores.directions import Blend, Directions
from kvx.stores.slots import first_empty, write_slot
from kvx.tokens import Tokens, concatenate

LOWER, UPPER = 0, 1


@pytree
class Waiting:
    """A pair's lower layer, whole, until the upper layer's prompt is in."""

    tokens: Tokens


@pytree
class Pair:
    """Keys and values of two layers at the same tokens; keys are rotated.

    The newest token is held exactly by each layer, and merges when the next one comes: so both layers attend to it as
    it is, as the paper has it, and every write comes before the step's reads.

    Bytes for C slots, N rows kept apart and itemsize s: per KV head C ((D + V) s + 20) + N (2 (D + V) s + 8)
    + 2 ((D + V) s + 4), where two dense layers of C slots take 2 C ((D + V) s + 4); and both layers' rotations.

    Attributes:
        keys, values: merged.
        slots: true positions of what is merged.
        fresh: each layer's newest token; one slot.
        blend: how they merge.
    """

    keys: Directions
    values: Directions
    slots: Int[Array, "B G C"]
    fresh: tuple[Dense, Dense]
    blend: Blend = static()

    @classmethod
    def pack(cls, lower: Tokens, upper: Tokens, mask: Bool[Array, "B G T"], capacity: int, blend: Blend) -> "Pair":
        """The tokens in `mask`, gathered in order into `capacity` slots and merged."""
        first, second = (tokens.with_form(rotated=True).select(mask, capacity) for tokens in (lower, upper))
        none = jnp.zeros(first.positions.shape, bool)
        return cls(
            Directions.pack(first.keys, second.keys, first.present, blend),
            Directions.pack(first.values, second.values, first.present, blend),
            first.positions,
            (Dense.pack(first, none, 1), Dense.pack(second, none, 1)),
            blend,
        )

    def settled(self, when: Bool[Array, "B G"]) -> "Pair":
        """The newest token of both layers merged into an empty slot, in the rows where `when`."""
        lower, upper = (fresh.tokens() for fresh in self.fresh)
        slot = jnp.where(when & lower.present[..., 0], first_empty(self.slots), self.slots.shape[-1])
        count = lower.positions[:, 0, 0] + 1
        return replace(
            self,
            keys=self.keys.write(slot, lower.keys[:, :, 0], upper.keys[:, :, 0], count, self.blend),
            values=self.values.write(slot, lower.values[:, :, 0], upper.values[:, :, 0], count, self.blend),
            slots=write_slot(self.slots, slot, lower.positions[:, :, 0]),
        )

    def renewed(self, layer: int, tokens: Tokens) -> "Pair":
        """With one layer's newest token replaced, in the rows that have one."""
        old, tokens = self.fresh[layer], tokens.with_form(rotated=True)
        here = tokens.present[..., None]
        new = replace(
            old,
            keys=jnp.where(here, tokens.keys.astype(old.keys.dtype), old.keys),
            values=jnp.where(here, tokens.values.astype(old.values.dtype), old.values),
            slots=jnp.where(tokens.present, tokens.positions, old.slots),
        )
        return replace(self, fresh=(new, self.fresh[UPPER]) if layer == LOWER else (self.fresh[LOWER], new))


@pytree
class Half:
    """One layer's view of a pair: what is merged, by slot, and behind it its newest token.

    It keeps no statistics.
    """

    pair: Pair
    layer: int = static()

    @property
    def fresh(self) -> Dense:
        """The newest token, exact."""
        return self.pair.fresh[self.layer]

    def append(self, tokens: Tokens) -> "Half":
        """One token; the lower layer, which is first, settles the one before. A row that has ended changes nothing."""
        pair = self.pair.settled(tokens.present[..., 0]) if self.layer == LOWER else self.pair
        return replace(self, pair=pair.renewed(self.layer, tokens))

    def read(self, query: Query) -> Partial:
        pair, spec = self.pair, query.spec
        batch, heads, group, length, dim = query.raw.shape
        rows = query.rotated.reshape(batch, heads, group * length, dim)
        logits = spec.scale * pair.keys.products(rows, self.layer)
        logits = logits if spec.softcap is None else spec.softcap * jnp.tanh(logits / spec.softcap)
        seen = visible(query.positions[:, None, :, None], pair.slots[:, :, None, :], spec.window)
        weights, lse = softmax_rows(jnp.where(jnp.tile(seen, (1, 1, group, 1)), logits, -jnp.inf))
        part = ungroup(Partial(pair.values.mixed(weights, self.layer), lse), group)
        return merge_partials(part, self.fresh.read(query))

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        keys, _, positions = self.dense()
        return decode_probabilities(query.rotated, keys, query.positions, positions, lse, **query.masking)

    def tokens(self) -> Tokens:
        pair = self.pair
        keys, values = pair.keys.restored(self.layer), pair.values.restored(self.layer)
        return concatenate(Tokens(keys, values, pair.slots, self.fresh.rotary), self.fresh.tokens())

    def positions(self) -> Int[Array, "B G C"]:
        return jnp.concatenate([self.pair.slots, self.fresh.slots], axis=-1)

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return {}

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "Half":
        return self

    def bytes_read(self) -> int:
        """What this layer's step touches; the other layer's touches the shared directions once more."""
        pair = self.pair
        return pair.keys.bytes_read() + pair.values.bytes_read() + pair.slots.nbytes + nbytes(self.fresh)


@pytree
class HalfPlace:
    """Where one layer of a pair lives: a storage slot of both."""

    slot: int = static()
    layer: int = static()

    @property
    def shared(self) -> bool:
        """Until the upper layer has come."""
        return self.layer == LOWER

    def load(self, storage: tuple) -> Half:
        """The layer's view."""
        return Half(storage[self.slot], self.layer)

    def save(self, storage: tuple, store: Half) -> tuple:
        """Storage with the pair as the layer left it."""
        return (*storage[: self.slot], store.pair, *storage[self.slot + 1 :])


@place.register(Waiting)
def _(store: Waiting, storage: tuple) -> tuple[HalfPlace, tuple]:
    """A new slot."""
    return HalfPlace(len(storage), LOWER), (*storage, store)


@place.register(Half)
def _(store: Half, storage: tuple) -> tuple[HalfPlace, tuple]:
    """The pair takes the place of the layer that waited, whose whole keys and values thereby go."""
    slot = next(index for index, held in enumerate(storage) if isinstance(held, Waiting))
    where = HalfPlace(slot, UPPER)
    return where, where.save(storage, store)
