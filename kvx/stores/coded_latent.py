"""The store of coded latents: a latent layer's rows with the latent in a few bits and the rotary key as it is."""

from dataclasses import field, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.kernels.decode_attention import decode_probabilities
from kvx.kernels.decode_attention.operands import Rows
from kvx.kernels.latent_decode_attention import CodedRows
from kvx.kernels.merge_partials import Partial
from kvx.kernels.quantize_pack.coded import TokenCodes
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.stores.base import nbytes
from kvx.stores.coded import Code
from kvx.stores.codes import write_columns, write_slots
from kvx.stores.slots import empty_slots, scatter, weakest_several
from kvx.tokens import Tokens


@pytree
class CodedLatent:
    """Slots of latent attention: position is in the rotary key, which stays exact, content in the latent, coded.

    As in the 8-bit layout of DeepSeek's FlashMLA (2025), here with uniform codes of any width. A token is coded once,
    when it arrives. Bytes per slot, with r latent channels in groups of n and p rotary ones: p * itemsize, and
    r * bits / 8 for codes, 4 * r / n for 16-bit scales and minima, 4 for the position, 4 for each statistic.

    Attributes:
        turned: rotary keys, rotated, in the cache's dtype; slots last, as those of codes are.
        latents: codes of the latents, which are the values too.
    """

    turned: Float[Array, "B G P C"]
    latents: TokenCodes
    slots: Int[Array, "B G C"]
    rotary: Rotary
    code: Code = static()
    stats: dict[str, Shaped[Array, "B G C"]] = field(default_factory=dict)

    @classmethod
    def pack(cls, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, *, code: Code) -> "CodedLatent":
        """The tokens in `mask`, gathered in order into `capacity` slots and coded."""
        kept = tokens.with_form(rotated=True).select(mask, capacity)
        turned, latents = _split(kept, code)
        return cls(turned, latents, kept.positions, kept.rotary, code, dict(kept.stats))

    def append(self, tokens: Tokens) -> "CodedLatent":
        """Any number of tokens at once, while there are empty slots."""
        slots = empty_slots(self.slots, tokens.positions.shape[-1])
        turned, latents = _split(tokens, self.code)
        return replace(
            self,
            turned=write_columns(self.turned, slots, turned),
            latents=write_slots(self.latents, slots, latents),
            slots=scatter(self.slots, slots, tokens.positions),
            stats={name: scatter(stat, slots, tokens.stats[name]) for name, stat in self.stats.items()},
        )

    def read(self, query: Query) -> Partial:
        return query.attend_rows(CodedRows(self.turned[:, 0], self.latents), self.slots[:, 0], slots_last=True)

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        keys = Rows(self._keys(query), slots_last=True)
        return decode_probabilities(query.rotated, keys, query.positions, self.slots, lse, **query.masking)

    def release(self, scores: Float[Array, "B G C"], excess: Int[Array, "B G"], most: int = 1) -> "CodedLatent":
        return replace(self, slots=jnp.where(weakest_several(scores, self.slots, excess, most), -1, self.slots))

    def tokens(self) -> Tokens:
        keys = jnp.swapaxes(self._keys(), -1, -2)
        return Tokens(keys, keys[..., :0], self.slots, self.rotary, self.stats)

    def positions(self) -> Int[Array, "B G C"]:
        return self.slots

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.attended_values, tokens.positions

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "CodedLatent":
        return replace(self, stats=stats)

    def bytes_read(self) -> int:
        return nbytes(self)

    def _keys(self, query: Query | None = None) -> Float[Array, "B G D C"]:
        """Rows [rotary key ; latent] in the cache's dtype; not before the query is known, see `TokenCodes.decode`."""
        latents = self.latents.decode(after=None if query is None else query.raw[:, :, 0, 0, 0])
        return jnp.concatenate([self.turned, latents.astype(self.turned.dtype)], axis=-2)


def _split(tokens: Tokens, code: Code) -> tuple[Float[Array, "B G P T"], TokenCodes]:
    """Rotated rotary keys, and coded latents."""
    keys, width = tokens.rotated_keys, tokens.rotary.width
    return jnp.swapaxes(keys[..., :width], -1, -2), code.encode(keys[..., width:])
