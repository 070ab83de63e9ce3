"""The dense store: rotated keys and values by slot, in the cache's dtype; eviction marks a slot empty for reuse."""

from dataclasses import field, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.buckets import round_up
from kvx.kernels.decode_attention import decode_probabilities
from kvx.kernels.implementations import LANES
from kvx.kernels.merge_partials import Partial
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.stores.base import nbytes
from kvx.stores.layout import APART, SLOTS_LAST, Layout, Pair
from kvx.stores.slots import empty_slots, scatter, weakest_several
from kvx.tokens import Tokens


@pytree
class Dense:
    """Slots of full-precision keys and values. Slot order is not age order once slots are reused.

    Bytes per slot and KV head: (D + V) * itemsize + 4 for the position + 4 for each statistic; of latent attention,
    whose values are channels of its keys, V is 0.

    Attributes:
        keys, values: (B, G, C, D) and (B, G, C, V), or as the layout holds them.
        slots: true positions, -1 where empty.
        rotary: the layer's rotation.
        stats: numbers kept with each token.
        rotated: which form the keys are in.
        layout: how they lie in memory.
    """

    keys: Float[Array, "B G m n"]
    values: Float[Array, "B G o p"]
    slots: Int[Array, "B G C"]
    rotary: Rotary
    stats: dict[str, Shaped[Array, "B G C"]] = field(default_factory=dict)
    rotated: bool = static(True)
    layout: Layout = static(APART)

    @classmethod
    def pack(cls, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, *, layout: Layout = APART) -> "Dense":
        """The tokens in `mask`, gathered in order into `capacity` slots; slots that are last fill whole lanes."""
        kept = tokens.select(mask, round_up(capacity, LANES) if layout == SLOTS_LAST else capacity)
        held = layout.hold((kept.keys, kept.values))
        return cls(*held, kept.positions, kept.rotary, dict(kept.stats), kept.rotated, layout)

    def append(self, tokens: Tokens) -> "Dense":
        """Any number of tokens at once, while there are empty slots."""
        tokens = tokens.with_form(self.rotated)
        slots = empty_slots(self.slots, tokens.positions.shape[-1])
        return replace(
            self._with(self.layout.put(self._held, slots, (tokens.keys, tokens.values))),
            slots=scatter(self.slots, slots, tokens.positions),
            stats={name: scatter(stat, slots, tokens.stats[name]) for name, stat in self.stats.items()},
        )

    def read(self, query: Query, rotated: Float[Array, "B G R T D"] | None = None) -> Partial:
        """`rotated`: the queries as another store rotates them; None: at their true positions."""
        return self.layout.attend(query, query.rotated if rotated is None else rotated, self._held, self.slots)

    def probabilities(
        self, query: Query, lse: Float[Array, "B G R T"], rotated: Float[Array, "B G R T D"] | None = None
    ) -> Float[Array, "B G R T C"]:
        queries, keys = self.layout.asked(query.rotated if rotated is None else rotated, self._held)
        return decode_probabilities(queries, keys, query.positions, self.slots, lse, **query.masking)

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
        keys, values = self.layout.show(self._held)
        keys = self.rotary.onwards(keys, distance) if self.rotated else keys
        moved = self._with(self.layout.hold((keys, values)))
        return replace(moved, slots=jnp.where(self.slots >= 0, positions, -1))

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
        return self._with(self.layout.put(self._held, target, (tokens.with_form(self.rotated).keys, tokens.values)))

    def write_values(self, slots: Int[Array, "B G n"], values: Float[Array, "B G n V"]) -> "Dense":
        """Values overwritten at ascending, distinct slots, those beyond the last dropped; nothing else changes."""
        return self._with(self.layout.put_values(self._held, slots, values))

    def tokens(self) -> Tokens:
        return Tokens(*self.layout.show(self._held), self.slots, self.rotary, self.stats, self.rotated)

    def positions(self) -> Int[Array, "B G C"]:
        return self.slots

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.rotated_keys, tokens.attended_values, self.slots

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "Dense":
        return replace(self, stats=stats)

    def bytes_read(self) -> int:
        return nbytes(self)

    @property
    def _held(self) -> Pair:
        return self.keys, self.values

    def _with(self, held: Pair) -> "Dense":
        return replace(self, keys=held[0], values=held[1])
