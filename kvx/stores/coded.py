"""The coded store: every key and value in a few bits, coded by itself the moment it arrives."""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.errors import BadInput
from kvx.kernels.decode_attention import decode_attention, decode_probabilities
from kvx.kernels.decode_attention.operands import Rows
from kvx.kernels.merge_partials import Partial
from kvx.kernels.quantize_pack.coded import TokenCodes
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.stores.base import nbytes
from kvx.stores.codes import write_slots
from kvx.stores.slots import first_empty, weakest_several, write_slot
from kvx.tokens import Tokens


@dataclass(frozen=True)
class Code:
    """How a token's key or value is written: a uniform code of `bits` for every group of channels.

    Attributes:
        bits: width of a code; None: the numbers as they are.
        group: channels that share a scale and a minimum; None: all of them, with 2 bits half of them.
    """

    bits: int | None
    group: int | None = None

    def check(self, width: int, what: str) -> None:
        """Refuse a width that does not divide into groups, or whose codes do not fill 32-bit words.

        Raises:
            BadInput: naming the hyperparameter.
        """
        if self.bits is None:
            return
        if width * self.bits % 32:
            raise BadInput(
                f"bits={self.bits} does not pack {what} of {width} channels into whole words; allowed: bits for which "
                f"{width} * bits is a multiple of 32, or None"
            )
        if width % self.channels(width):
            raise BadInput(
                f"group={self.group} does not divide {what} of {width} channels; allowed: divisors of {width}"
            )

    def channels(self, width: int) -> int:
        """Channels in each group."""
        return self.group or (width // 2 if self.bits == 2 else width)

    def encode(self, rows: Float[Array, "B G C D"]) -> TokenCodes | Rows:
        """Rows coded along their last axis, or as they are if there is nothing to code."""
        if self.bits is None:
            return Rows(rows)
        return TokenCodes.encode(rows, self.bits, self.channels(rows.shape[-1]))


@pytree
class Coded:
    """Slots of rotated keys and values in low bits. A token is coded once; nothing is ever coded again.

    Bytes per slot and KV head, with n channels a group: (D + V) * bits / 8 for codes, 4 * (D / n + V / n) for 16-bit
    scales and minima, 4 for the position, 4 for each statistic; and once 4 * G * D for the balance.

    Attributes:
        balance: positive factor on each key channel before it is coded; queries are divided by it, so that logits are
            what they were and only the rounding error moves between channels. `dense()` shows true keys. None: ones.
    """

    keys: TokenCodes | Rows
    values: TokenCodes | Rows
    slots: Int[Array, "B G C"]
    rotary: Rotary
    balance: Float[Array, "B G D"] | None = None
    stats: dict[str, Shaped[Array, "B G C"]] = field(default_factory=dict)
    code: Code = static(Code(None))

    @classmethod
    def pack(
        cls,
        tokens: Tokens,
        mask: Bool[Array, "B G T"],
        capacity: int,
        *,
        code: Code,
        balance: Float[Array, "B G D"] | None = None,
    ) -> "Coded":
        """The tokens in `mask`, gathered in order into `capacity` slots and coded."""
        kept = tokens.with_form(rotated=True).select(mask, capacity)
        keys = code.encode(_balanced(kept.keys, balance))
        values = code.encode(kept.values)
        return cls(keys, values, kept.positions, kept.rotary, balance, dict(kept.stats), code)

    def append(self, tokens: Tokens) -> "Coded":
        slot = first_empty(self.slots)
        keys = self.code.encode(_balanced(tokens.rotated_keys, self.balance))
        values = self.code.encode(tokens.values)
        return replace(
            self,
            keys=_write(self.keys, slot, keys),
            values=_write(self.values, slot, values),
            slots=write_slot(self.slots, slot, tokens.positions[:, :, 0]),
            stats={name: write_slot(stat, slot, tokens.stats[name][:, :, 0]) for name, stat in self.stats.items()},
        )

    def read(self, query: Query) -> Partial:
        return decode_attention(
            self._queries(query), self.keys, self.values, query.positions, self.slots, **query.masking
        )

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        return decode_probabilities(self._queries(query), self.keys, query.positions, self.slots, lse, **query.masking)

    def release(self, scores: Float[Array, "B G C"], excess: Int[Array, "B G"], most: int = 1) -> "Coded":
        return replace(self, slots=jnp.where(weakest_several(scores, self.slots, excess, most), -1, self.slots))

    def tokens(self) -> Tokens:
        keys = _decoded(self.keys)
        if self.balance is not None:
            keys = (keys / self.balance[:, :, None]).astype(keys.dtype)
        return Tokens(keys, _decoded(self.values), self.slots, self.rotary, self.stats)

    def positions(self) -> Int[Array, "B G C"]:
        return self.slots

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.values, tokens.positions

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "Coded":
        return replace(self, stats=stats)

    def bytes_read(self) -> int:
        return nbytes(self)

    def _queries(self, query: Query) -> Float[Array, "B G R T D"]:
        """Rotated queries for balanced keys, in float32 where a balance may leave the range of 16-bit floats."""
        return query.rotated if self.balance is None else query.rotated / self.balance[:, :, None, None]


def _balanced(keys: Float[Array, "B G T D"], balance: Float[Array, "B G D"] | None) -> Float[Array, "B G T D"]:
    """Keys times their balance, float32."""
    return keys if balance is None else keys * balance[:, :, None]


def _decoded(rows: TokenCodes | Rows) -> Float[Array, "B G C D"]:
    return rows.array if isinstance(rows, Rows) else jnp.swapaxes(rows.decode(), -1, -2)


def _write(rows: TokenCodes | Rows, slot: Int[Array, "B G"], new: TokenCodes | Rows) -> TokenCodes | Rows:
    """One slot a head overwritten."""
    if isinstance(rows, Rows):
        assert isinstance(new, Rows), "one code wrote both"
        return Rows(write_slot(rows.array, slot, new.array[:, :, 0]))
    assert isinstance(new, TokenCodes), "one code wrote both"
    return write_slots(rows, slot[..., None], new)
