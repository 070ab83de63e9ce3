"""The dense store: rotated keys and values by slot, in the cache's dtype; eviction marks a slot empty for reuse.

On a TPU the last axis of an array fills lanes of 128: a head dim of 64 would take twice its bytes there, or the whole
cache would be turned about at every write. For such heads the slots are last.
"""

from dataclasses import field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.buckets import round_up
from kvx.kernels.decode_attention import decode_probabilities
from kvx.kernels.decode_attention.operands import Rows
from kvx.kernels.implementations import target_platform
from kvx.kernels.merge_partials import Partial
from kvx.kernels.write_lanes import write_lanes
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.stores.base import nbytes
from kvx.tokens import Tokens

LANES = 128
"""Of a TPU's vector unit."""


@pytree
class Dense:
    """Slots of full-precision keys and values. Slot order is not age order once slots are reused.

    Bytes per slot and KV head: (D + V) * itemsize + 4 for the position + 4 for each statistic; of latent attention,
    whose values are channels of its keys, V is 0.

    Attributes:
        keys, values: (B, G, C, D) and (B, G, C, V); with `slots_last` (B, G, D, C) and (B, G, V, C).
        slots: true positions, -1 where empty.
        rotary: the layer's rotation.
        stats: numbers kept with each token.
        rotated: which form the keys are in.
        slots_last: the layout.
    """

    keys: Float[Array, "B G m n"]
    values: Float[Array, "B G o p"]
    slots: Int[Array, "B G C"]
    rotary: Rotary
    stats: dict[str, Shaped[Array, "B G C"]] = field(default_factory=dict)
    rotated: bool = static(True)
    slots_last: bool = static(False)

    @classmethod
    def pack(cls, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, *, slots_last: bool = False) -> "Dense":
        """The tokens in `mask`, gathered in order into `capacity` slots; with `slots_last` into whole lanes of them."""
        kept = tokens.select(mask, round_up(capacity, LANES) if slots_last else capacity)
        keys, values = (jnp.swapaxes(each, 2, 3) if slots_last else each for each in (kept.keys, kept.values))
        return cls(keys, values, kept.positions, kept.rotary, dict(kept.stats), kept.rotated, slots_last)

    def append(self, tokens: Tokens) -> "Dense":
        """Any number of tokens at once, while there are empty slots."""
        tokens = tokens.with_form(self.rotated)
        slots = empty_slots(self.slots, tokens.positions.shape[-1])
        return replace(
            self,
            keys=self._scattered(self.keys, slots, tokens.keys),
            values=self._scattered(self.values, slots, tokens.values),
            slots=scatter(self.slots, slots, tokens.positions),
            stats={name: scatter(stat, slots, tokens.stats[name]) for name, stat in self.stats.items()},
        )

    def read(self, query: Query) -> Partial:
        return query.attend(self._rows(self.keys), self._rows(self.values), self.slots)

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        keys = self._rows(self.keys)
        return decode_probabilities(query.rotated, keys, query.positions, self.slots, lse, **query.masking)

    def release(self, scores: Float[Array, "B G C"], excess: Int[Array, "B G"], most: int = 1) -> "Dense":
        return replace(self, slots=jnp.where(weakest_several(scores, self.slots, excess, most), -1, self.slots))

    def crop(self, next: Int[Array, "B"]) -> "Dense":
        """Without the tokens at or beyond these positions, as if they had never come."""
        return replace(self, slots=jnp.where(self.slots >= next[:, None, None], -1, self.slots))

    def narrow(self, on: bool = True) -> "Dense":
        """There is one view of it."""
        return self

    def move(self, positions: Int[Array, "B G C"]) -> "Dense":
        """The tokens at other true positions, by slot; -1 where one goes. Keys are turned on, by a float32 rotation."""
        distance = jnp.where((positions >= 0) & (self.slots >= 0), positions - self.slots, 0)
        keys = self._turned(self.keys)
        keys = self.rotary.onwards(keys, distance) if self.rotated else keys
        return replace(self, keys=self._turned(keys), slots=jnp.where(self.slots >= 0, positions, -1))

    def evict(self, slot: Int[Array, "B G"], when: Bool[Array, "B G"]) -> "Dense":
        """Mark one slot a head empty where `when`; its bytes are reused by the next token."""
        chosen = when[..., None] & (jnp.arange(self.slots.shape[-1]) == slot[..., None])
        return replace(self, slots=jnp.where(chosen, -1, self.slots))

    def take(self, slot: Int[Array, "B G"], when: Bool[Array, "B G"]) -> Tokens:
        """One token a head, "no token" where not `when`."""
        return self.tokens().take(slot[..., None], when[..., None])

    def write(self, slot: Int[Array, "B G"], tokens: Tokens, when: Bool[Array, "B G"]) -> "Dense":
        """One token a head overwritten where `when`; its position and statistics stay."""
        target = jnp.where(when, slot, self.slots.shape[-1])[..., None]
        return replace(
            self,
            keys=self._scattered(self.keys, target, tokens.with_form(self.rotated).keys),
            values=self._scattered(self.values, target, tokens.values),
        )

    def write_values(self, slots: Int[Array, "B G n"], values: Float[Array, "B G n V"]) -> "Dense":
        """Values overwritten at ascending, distinct slots, those beyond the last dropped; nothing else changes."""
        return replace(self, values=self._scattered(self.values, slots, values))

    def tokens(self) -> Tokens:
        keys, values = self._turned(self.keys), self._turned(self.values)
        return Tokens(keys, values, self.slots, self.rotary, self.stats, self.rotated)

    def positions(self) -> Int[Array, "B G C"]:
        return self.slots

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.rotated_keys, tokens.attended_values, self.slots

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "Dense":
        return replace(self, stats=stats)

    def bytes_read(self) -> int:
        return nbytes(self)

    def _rows(self, array: Float[Array, "B G m n"]) -> Float[Array, "B G m n"] | Rows:
        """As attention takes it."""
        return Rows(array, slots_last=True) if self.slots_last else array

    def _turned(self, array: Float[Array, "B G m n"]) -> Float[Array, "B G o p"]:
        """From the layout that it is held in to (B, G, C, D), and back."""
        return jnp.swapaxes(array, 2, 3) if self.slots_last else array

    def _scattered(
        self, array: Float[Array, "B G m n"], index: Int[Array, "B G i"], rows: Float[Array, "B G i D"]
    ) -> Float[Array, "B G m n"]:
        """As `scatter`, in the layout that it is held in."""
        if self.slots_last and index.shape[-1] == 1:
            return write_lanes(array, index, rows[..., None])
        return self._turned(scatter(self._turned(array), index, rows))


def lanes_wanted(tokens: Tokens) -> bool:
    """Whether the slots are to be last: for the TPU that is compiled for, where rows do not fill its lanes."""
    widths = tokens.keys.shape[-1], tokens.values.shape[-1]
    return target_platform() == "tpu" and all(width and width % LANES for width in widths)


def first_empty(slots: Int[Array, "B G C"]) -> Int[Array, "B G"]:
    """Index of the first empty slot; C where there is none, which no write reaches."""
    capacity = slots.shape[-1]
    return jnp.min(jnp.where(slots < 0, jnp.arange(capacity), capacity), axis=-1)


def empty_slots(slots: Int[Array, "B G C"], count: int) -> Int[Array, "B G n"]:
    """Indices of the first `count` empty slots, ascending; past the last, out of reach, if there are fewer."""
    if count == 1:
        return first_empty(slots)[..., None]
    index = jnp.arange(slots.shape[-1])
    # Occupied ones count as beyond the last, each by its own index: a scatter is promised distinct ones.
    return jnp.sort(jnp.where(slots < 0, index, index + index.size), axis=-1)[..., :count]


def scatter(
    array: Shaped[Array, "B G C *rest"], index: Int[Array, "B G n"], rows: Shaped[Array, "B G n *rest"]
) -> Shaped[Array, "B G C *rest"]:
    """Rows written in place along the third axis at ascending, distinct indices; those beyond the end are dropped.

    The form of which XLA makes no copy of the array; a conditional or `where` around it would.
    """
    if index.shape[-1] == 1:
        return write_slot(array, index[..., 0], rows[:, :, 0])
    batch, heads = jnp.ogrid[: array.shape[0], : array.shape[1]]
    return array.at[batch[..., None], heads[..., None], index].set(
        rows.astype(array.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
    )


def write_slot(
    array: Shaped[Array, "B G C *rest"], slot: Int[Array, "B G"], value: Shaped[Array, "B G *rest"]
) -> Shaped[Array, "B G C *rest"]:
    """One row a head overwritten in place.

    A scatter with unique, sorted indices is the form of which XLA on CPU makes no copy of the cache, where
    dynamic_update_slice and `where` do.
    """
    if slot.size == 1:
        # XLA turns a scatter of one row into a dynamic_update_slice; so there is a second, beyond the end, dropped.
        slot = jnp.concatenate([slot, jnp.full_like(slot, array.shape[2] + 1)], axis=1)
        value = jnp.concatenate([value, value], axis=1)
    batch, heads = jnp.ogrid[: array.shape[0], : array.shape[1]]
    return array.at[batch, heads, slot].set(
        value.astype(array.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
    )


def weakest(scores: Float[Array, "B G C"], slots: Int[Array, "B G C"]) -> Int[Array, "B G"]:
    """The occupied slot with the lowest score; in a tie the higher position, so that the lower is kept."""
    occupied = slots >= 0
    lowest = jnp.min(jnp.where(occupied, scores, jnp.inf), axis=-1, keepdims=True)
    tied = jnp.where(occupied & (scores == lowest), slots, -1)
    return jnp.argmax(tied, axis=-1).astype(jnp.int32)


def weakest_several(
    scores: Float[Array, "B G C"], slots: Int[Array, "B G C"], excess: Int[Array, "B G"], most: int
) -> Bool[Array, "B G C"]:
    """Mask of the `excess` occupied slots with the lowest scores, at most `most`; ties as in `weakest`."""
    index = jnp.arange(slots.shape[-1])
    if most == 1:
        return (excess > 0)[..., None] & (index == weakest(scores, slots)[..., None])
    worth = jnp.where(slots >= 0, scores, jnp.inf)
    keys = (worth, -slots, jnp.broadcast_to(index, slots.shape))
    order = jax.lax.sort(keys, dimension=-1, num_keys=2)[2][..., :most]
    leaving = jnp.arange(order.shape[-1]) < jnp.minimum(excess, most)[..., None]
    batch, heads = jnp.ogrid[: slots.shape[0], : slots.shape[1]]
    chosen = jnp.zeros(slots.shape, bool).at[batch[..., None], heads[..., None], order].set(leaving)
    return chosen & (slots >= 0)
