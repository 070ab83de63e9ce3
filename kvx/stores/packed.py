"""The packed store: low-bit codes behind an exact tail, keys grouped by channel, values by token (KIVI's layout)."""

from dataclasses import field, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.kernels.decode_attention import decode_attention, decode_probabilities
from kvx.kernels.decode_attention.operands import Tail
from kvx.kernels.merge_partials import Partial
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes
from kvx.kernels.write_lanes import write_lanes
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stores.base import nbytes
from kvx.stores.codes import never, write_blocks, write_slots
from kvx.stores.dense import Dense
from kvx.stores.slots import first_empty, scatter
from kvx.tokens import Tokens, concatenate

FREE, RESERVED = -1, -2
"""Position of a packed slot that holds nothing, and of one that holds a key whose value is still in the tail."""


@pytree
class Packed:
    """P packed slots, and a ring of the newest R + 1 tokens at full precision.

    When a step reads, with a tokens arrived (its own included), keys [0, R floor((a - 1) / R)) and values
    [0, a - 1 - R) are codes, as in KIVI (Liu et al. 2024, algorithm 1): keys leave the ring in blocks of R, values one
    by one. A token's value is packed later than its key, into the same slot, so that for a while its key is read as
    codes and its value exactly; hence one store and no two tiers. What fills the ring is packed by the next `append`,
    before it writes: the step that fills it still reads exact keys. Nothing is packed twice.

    Slots are shown as the P packed ones (empty while the value is in the ring), then the R + 1 of the ring. A key group
    is n slots that arrived one after the other. Under a selection that acts at every step whole groups leave and later
    blocks reuse them, so slots are in no order; positions say what is where.

    Bytes per packed slot and KV head at b bits: (D + V) b / 8 + 4 (D + V) / n + 4 for the position + 4 for each
    statistic. Per ring entry: (D + V) * itemsize + 8 for position and place + 4 for each statistic.

    Attributes:
        keys, values: codes of the packed slots.
        slots: true positions; FREE or RESERVED where there is no value.
        kept: statistics of the packed slots; they follow the value.
        tail: the ring. A key that is packed too stands in it as its code says.
        places: packed slot of each ring entry's key, -1 while only the ring holds it.
        group: n.
    """

    keys: ChannelCodes
    values: TokenCodes
    slots: Int[Array, "B G P"]
    tail: Dense
    places: Int[Array, "B G E"]
    kept: dict[str, Float[Array, "B G P"]] = field(default_factory=dict)
    group: int = static(32)

    @classmethod
    def pack(
        cls,
        tokens: Tokens,
        mask: Bool[Array, "B G T"],
        capacity: int,
        *,
        slots: int,
        bits: int,
        group: int,
        residual: int,
    ) -> "Packed":
        """The tokens in `mask`, in order: the oldest as codes, the newest in the ring.

        Args:
            capacity: the most tokens `mask` holds for a head.
            slots: packed slots P, a multiple of `group`, at least `residual`.
            bits: width of the codes.
            group: n tokens of a channel, or n channels of a token, share a scale and a minimum.
            residual: R, a multiple of `group`.
        """
        chosen = tokens.with_form(rotated=True).select(mask, max(capacity, slots))
        count = jnp.sum(chosen.present, axis=-1, keepdims=True)
        with_key, with_value = residual * (count // residual), jnp.maximum(count - residual, 0)
        index = jnp.arange(slots)
        state = jnp.where(index < with_key, RESERVED, FREE)
        newest = with_value + jnp.arange(residual + 1)
        ring = chosen.take(jnp.minimum(newest, chosen.positions.shape[-1] - 1), newest < count)
        keys = ChannelCodes.encode(chosen.keys[:, :, :slots], bits, group)
        places = jnp.where(newest < with_key, newest, -1)
        coded = jnp.take_along_axis(keys.decode(), jnp.maximum(places, 0)[:, :, None], axis=-1)
        coded = jnp.swapaxes(coded, -1, -2).astype(ring.keys.dtype)
        return cls(
            keys,
            TokenCodes.encode(chosen.values[:, :, :slots], bits, group),
            jnp.where(index < with_value, chosen.positions[:, :, :slots], state),
            Dense(
                jnp.where(places[..., None] >= 0, coded, ring.keys),
                ring.values,
                ring.positions,
                ring.rotary,
                dict(ring.stats),
            ),
            places,
            {name: stat[:, :, :slots] for name, stat in chosen.stats.items()},
            group,
        )

    def append(self, tokens: Tokens) -> "Packed":
        tokens = tokens.with_form(rotated=True)
        ready = self._flush_keys(tokens.present[..., 0])._flush_value(tokens.present[..., 0])
        entries = jnp.arange(self.places.shape[-1])
        fresh = entries == first_empty(ready.tail.slots)[..., None]
        return replace(ready, tail=ready.tail.append(tokens), places=jnp.where(fresh, -1, ready.places))

    def _flush_keys(self, active: Bool[Array, "B G"]) -> "Packed":
        """Pack the ring's keys where all R that are due have come.

        The block is coded at every step, due or not, and written nowhere if not: it is small, and a conditional would
        copy what it may write.
        """
        size = self.places.shape[-1]
        exact = (self.tail.slots >= 0) & (self.places < 0)
        due = active & (jnp.sum(exact, axis=-1) == size - 1)
        first = _oldest(self.tail.slots, exact)[..., None]
        block = (first + jnp.arange(size - 1)) % size
        codes = ChannelCodes.encode(
            jnp.take_along_axis(self.tail.keys, block[..., None], axis=2), self.keys.bits, self.group
        )
        groups = self._free_groups(codes.ranges.shape[-2], due)
        reserved = jnp.full((*groups.shape, 1, self.group), RESERVED, jnp.int32)
        age = (jnp.arange(size) - first) % size
        place = jnp.take_along_axis(groups, jnp.minimum(age // self.group, groups.shape[-1] - 1), axis=-1)
        moved = due[..., None] & (age < size - 1)
        # The ring's keys become what their codes say, so that a read need not look them up: of all entries but one.
        index = jnp.arange(size - 1)
        packed = index + (index >= (first - 1) % size)
        coded = jnp.take_along_axis(codes.decode(), ((packed - first) % size)[:, :, None], axis=-1)
        keys = scatter(self.tail.keys, jnp.where(due[..., None], packed, packed + size), jnp.swapaxes(coded, -1, -2))
        return replace(
            self,
            keys=write_blocks(self.keys, groups, codes),
            slots=write_lanes(self.slots[:, :, None], groups, reserved)[:, :, 0],
            places=jnp.where(moved, place * self.group + age % self.group, self.places),
            tail=self._read(codes.scale, replace(self.tail, keys=keys)),
        )

    def _free_groups(self, count: int, due: Bool[Array, "B G"]) -> Int[Array, "B G m"]:
        """The first `count` groups that hold nothing; indices beyond the last where nothing is due."""
        first = self.slots[..., :: self.group]  # a group is reserved, and released, as a whole
        index = jnp.arange(first.shape[-1])
        # Groups in use count as beyond the last, each by its own index: the scatter is promised distinct ones.
        usable = (first == FREE) & due[..., None]
        return jnp.sort(jnp.where(usable, index, index + index.size), axis=-1)[..., :count]

    def _flush_value(self, active: Bool[Array, "B G"]) -> "Packed":
        """Pack the oldest value, with position and statistics, where the ring is full."""
        oldest = _oldest(self.tail.slots, self.tail.slots >= 0)
        due = active & jnp.all(self.tail.slots >= 0, axis=-1)
        gone = self.tail.take(oldest, due)
        place = jnp.take_along_axis(self.places, oldest[..., None], axis=-1)
        slot = jnp.where(due[..., None], place, self.slots.shape[-1])
        codes = TokenCodes.encode(gone.values, self.values.bits, self.group)
        return replace(
            self,
            values=write_slots(self.values, slot, codes),
            slots=scatter(self.slots, slot, gone.positions),
            kept={name: scatter(stat, slot, gone.stats[name]) for name, stat in self.kept.items()},
            tail=self._read(codes.scale, self.tail.evict(oldest, due)),
        )

    @staticmethod
    def _read(scale: Float[Array, "B G *rest"], tail: Dense) -> Dense:
        """The ring once these codes of it are made: where the next token is written then waits for them.

        XLA orders the two so, and copies the ring otherwise.
        """
        return replace(tail, slots=jnp.where(never(scale), -1, tail.slots))

    def read(self, query: Query) -> Partial:
        return decode_attention(
            query.rotated, self.keys, self.values, query.positions, self.slots, tail=self._ring, **query.masking
        )

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        return decode_probabilities(
            query.rotated, self.keys, query.positions, self.slots, lse, tail=self._ring, **query.masking
        )

    @property
    def _ring(self) -> Tail:
        """The exact tail as attention takes it."""
        return Tail(self.tail.keys, self.tail.values, self.tail.slots)

    @property
    def unit(self) -> int:
        """Tokens that leave together."""
        return self.group

    def release(self, scores: Float[Array, "B G C"], excess: Int[Array, "B G"], most: int = 1) -> "Packed":
        """Free the key group with the lowest mean score, of a head that holds at least a group too much.

        Only groups whose values are packed too can go, and none with a protected token; so a head never holds fewer
        than its ring. In a tie the group of higher positions goes.
        """
        by_group = self.slots.reshape(*self.slots.shape[:2], -1, self.group)
        scored = scores[:, :, : self.slots.shape[-1]].reshape(by_group.shape)
        mean = jnp.mean(scored, axis=-1)
        can_go = jnp.all(by_group >= 0, axis=-1) & ~jnp.any(jnp.isposinf(scored), axis=-1)
        lowest = jnp.min(jnp.where(can_go, mean, jnp.inf), axis=-1, keepdims=True)
        tied = jnp.where(can_go & (mean == lowest), by_group[..., 0], -1)
        group = jnp.argmax(tied, axis=-1)
        gone = (excess >= self.group) & jnp.any(can_go, axis=-1)
        chosen = gone[..., None] & (jnp.arange(by_group.shape[2]) == group[..., None])
        return replace(self, slots=jnp.where(chosen[..., None], FREE, by_group).reshape(self.slots.shape))

    def tokens(self) -> Tokens:
        keys = jnp.swapaxes(self.keys.decode(), -1, -2).astype(self.tail.keys.dtype)
        values = jnp.swapaxes(self.values.decode(), -1, -2).astype(self.tail.values.dtype)
        packed = Tokens(keys, values, jnp.maximum(self.slots, -1), self.tail.rotary, dict(self.kept))
        return concatenate(packed, self.tail.tokens())

    def positions(self) -> Int[Array, "B G C"]:
        return jnp.concatenate([jnp.maximum(self.slots, -1), self.tail.slots], axis=-1)

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return {name: jnp.concatenate([stat, self.tail.stats[name]], axis=-1) for name, stat in self.kept.items()}

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "Packed":
        slots = self.slots.shape[-1]
        ring = {name: stat[..., slots:] for name, stat in stats.items()}
        return replace(
            self, kept={name: stat[..., :slots] for name, stat in stats.items()}, tail=self.tail.with_stats(ring)
        )

    def bytes_read(self) -> int:
        return nbytes(self)


def _oldest(positions: Int[Array, "B G E"], among: Bool[Array, "B G E"]) -> Int[Array, "B G"]:
    """Index of the lowest position among those marked."""
    return jnp.argmin(jnp.where(among, positions, jnp.iinfo(jnp.int32).max), axis=-1)
