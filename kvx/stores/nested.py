"""The nested store: codes in two nibbles behind an exact double buffer; read by the upper ones alone, or by both."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.kernels.decode_attention import ungroup
from kvx.kernels.logits import partial_softmax, scaled_logits, slot_probabilities, visible
from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stores.base import nbytes
from kvx.stores.codes import never, write_blocks, write_slots
from kvx.stores.dense import Dense
from kvx.stores.slots import scatter
from kvx.tokens import Tokens, concatenate


@pytree
class Nested:
    """P coded slots in order of arrival, and a buffer of the newest tokens at full precision (QuantSpec's layout).

    With blocks of n tokens, the query of the i-th token that a head holds (from 0) reads n max(floor(i / n) - 1, 0)
    tokens as codes and the others exactly, at least n of them: two buffers of n, of which the first is coded when the
    second is full. That depends on i alone. `settle` codes a block as soon as it is complete and keeps its exact form
    for as long as any query reads it, so it never changes what is read, and several queries of one run may stand on
    either side of a boundary. Hence tokens verified together read what they would have read one by one.

    New tokens go to the buffer and are coded by `settle` only, so `crop` can take the newest back without touching
    codes. `settle` keeps fewer than 2n tokens in the buffer; 2n + g entries then hold a run of g + 1 more.

    Keeps no statistics: it cannot free a slot, so that nothing which reads them while decoding may precede it.

    Bytes per coded slot and KV head at b + b bits: (D + V) b / 4 + 4 D / n + 4 V / min(n, V) + 4 for the position. Per
    buffer entry: (D + V) * itemsize + 4.

    Attributes:
        keys, values: nested codes of the slots.
        slots: true positions of what is coded, -1 behind it.
        buffer: the newest tokens; those of the oldest block may be coded too.
        group: n.
        narrowed: read the upper codes only. The arrays are the same.
    """

    keys: ChannelCodes
    values: TokenCodes
    slots: Int[Array, "B G P"]
    buffer: Dense
    group: int = static(128)
    narrowed: bool = static(False)

    @classmethod
    def pack(
        cls, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, *, bits: int, group: int, drafts: int
    ) -> "Nested":
        """The tokens in `mask`, in order.

        Args:
            capacity: the most tokens that a head will ever hold.
            bits: width b of either code.
            group: n tokens of a channel, or min(n, V) channels of a token, share a scale and a minimum.
            drafts: g; a run of g + 1 tokens can be appended and taken back. At most n - 1.
        """
        slots = max(capacity // group, 1) * group
        chosen = tokens.with_form(rotated=True).select(mask, max(capacity, slots))
        count = jnp.sum(chosen.present, axis=-1, keepdims=True)
        coded = group * (count // group)
        newest = jnp.maximum(coded - group, 0) + jnp.arange(2 * group + drafts)
        exact = chosen.take(jnp.minimum(newest, chosen.positions.shape[-1] - 1), newest < count)
        values = chosen.values[:, :, :slots]
        return cls(
            ChannelCodes.encode(chosen.keys[:, :, :slots], bits, group, nested=True),
            TokenCodes.encode(values, bits, min(group, values.shape[-1]), nested=True),
            jnp.where(jnp.arange(slots) < coded, chosen.positions[:, :, :slots], -1),
            Dense(exact.keys, exact.values, exact.positions, exact.rotary),
            group,
        )

    def append(self, tokens: Tokens) -> "Nested":
        """A run of up to g + 1 tokens, into the buffer."""
        return replace(self, buffer=self.buffer.append(tokens))

    def settle(self) -> "Nested":
        """Code the next block if the buffer holds all of it, and free the entries that no later query reads.

        Every token held must be there to stay. The block is coded at every call, due or not, and written nowhere if
        not: it is small, and a conditional would copy what it may write.
        """
        size, index = self.slots.shape[-1], jnp.arange(self.group)
        coded = jnp.sum(self.slots >= 0, axis=-1, keepdims=True)
        fresh = self.buffer.slots > jnp.max(self.slots, axis=-1, keepdims=True)
        due = jnp.sum(fresh, axis=-1, keepdims=True) >= self.group
        age = jnp.where(fresh, self.buffer.slots, jnp.iinfo(jnp.int32).max)
        block = self.buffer.tokens().take(
            jnp.argsort(age, axis=-1)[..., : self.group], jnp.broadcast_to(due, (*due.shape[:2], self.group))
        )
        at = jnp.where(due, coded, size) + index
        values = TokenCodes.encode(block.values, self.values.bits, self.values.group, nested=True)
        keys = ChannelCodes.encode(block.keys, self.keys.bits, self.group, nested=True)
        settled = replace(
            self,
            keys=write_blocks(self.keys, at[..., :1] // self.group, keys),
            values=write_slots(self.values, at, values),
            slots=scatter(self.slots, at, block.positions),
        )
        gone = self.buffer.slots <= settled._next_boundary()
        # Where the next token is written depends on the block having been read: XLA then orders the two, else it copies
        # the buffer.
        gone = gone | (never(keys.scale) | never(values.scale))
        return replace(settled, buffer=replace(self.buffer, slots=jnp.where(gone, -1, self.buffer.slots)))

    def crop(self, next: Int[Array, "B"]) -> "Nested":
        """Without the tokens at or beyond these positions, which came after the last `settle`."""
        return replace(self, buffer=self.buffer.crop(next))

    def narrow(self, on: bool = True) -> "Nested":
        """The view that reads the upper codes only, or (not `on`) both again; no array changes."""
        return replace(self, narrowed=on)

    def _boundary(self, positions: Int[Array, "B T"]) -> Int[Array, "B G T"]:
        """Position of the last token that the query at each position reads as codes; -1: none."""
        newest = jnp.max(self.slots, axis=-1)[..., None, None]
        exact = self.buffer.slots[:, :, None]
        later = jnp.sum((exact > newest) & (exact < positions[:, None, :, None]), axis=-1)
        index = jnp.sum(self.slots >= 0, axis=-1)[..., None] + later
        codes = self.group * (index // self.group - 1)
        last = jnp.take_along_axis(self.slots, jnp.maximum(codes - 1, 0), axis=-1)
        return jnp.where(codes > 0, last, -1)

    def _next_boundary(self) -> Int[Array, "B G 1"]:
        """The boundary of the next token's query."""
        return self._boundary(jnp.full((self.slots.shape[0], 1), jnp.iinfo(jnp.int32).max))

    def read(self, query: Query) -> Partial:
        codes, exact = self._logits(query)
        values = self.values.decode(after=query.raw[:, :, 0, 0, 0], upper=self.narrowed)
        part = merge_partials(
            partial_softmax(codes, jnp.swapaxes(values, -1, -2).astype(self.buffer.values.dtype)),
            partial_softmax(exact, self.buffer.values),
        )
        return ungroup(part, query.raw.shape[2])

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        logits = jnp.concatenate(self._logits(query), axis=-1)
        return slot_probabilities(logits.reshape(*query.raw.shape[:4], -1), lse)

    def _logits(self, query: Query) -> tuple[Float[Array, "B G Q P"], Float[Array, "B G Q E"]]:
        """Masked logits of the coded slots and of the buffer; a token in both shows once."""
        batch, heads, group, length, dim = query.raw.shape
        rows, spec = query.rotated.reshape(batch, heads, group * length, dim), query.spec
        # Slots stay along the last axis, as they lie: turned about, XLA would decode into a transposed copy.
        columns = self.keys.decode(after=query.raw[:, :, 0, 0, 0], upper=self.narrowed).astype(self.buffer.keys.dtype)
        codes = spec.scale * jnp.einsum("bgtd,bgdp->bgtp", rows, columns, preferred_element_type=jnp.float32)
        codes = codes if spec.softcap is None else spec.softcap * jnp.tanh(codes / spec.softcap)
        exact = scaled_logits(rows, self.buffer.keys, spec.scale, spec.softcap)
        boundary = self._boundary(query.positions)[..., None]

        def masked(logits, slots, here):
            seen = here & visible(query.positions[:, None, :, None], slots, spec.window)
            return jnp.where(jnp.tile(seen, (1, 1, group, 1)), logits, -jnp.inf)

        coded, newest = self.slots[:, :, None], self.buffer.slots[:, :, None]
        return masked(codes, coded, coded <= boundary), masked(exact, newest, newest > boundary)

    def tokens(self) -> Tokens:
        keys = jnp.swapaxes(self.keys.decode(upper=self.narrowed), -1, -2).astype(self.buffer.keys.dtype)
        values = jnp.swapaxes(self.values.decode(upper=self.narrowed), -1, -2).astype(self.buffer.values.dtype)
        coded, exact = self._shown()
        buffer = replace(self.buffer.tokens(), positions=exact)
        return concatenate(Tokens(keys, values, coded, self.buffer.rotary), buffer)

    def _shown(self) -> tuple[Int[Array, "B G P"], Int[Array, "B G E"]]:
        """Positions as the next token's query sees them, each in one place."""
        boundary, buffer = self._next_boundary(), self.buffer.slots
        return jnp.where(self.slots <= boundary, self.slots, -1), jnp.where(buffer > boundary, buffer, -1)

    def positions(self) -> Int[Array, "B G C"]:
        return jnp.concatenate(self._shown(), axis=-1)

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return {}

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "Nested":
        assert not stats, "nothing that keeps statistics precedes this store"
        return self

    def bytes_read(self) -> int:
        return nbytes(self) - (nbytes((self.keys.lower, self.values.lower)) if self.narrowed else 0)
