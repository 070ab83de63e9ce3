"""The mean token: one slot a head that stands for any number of tokens by the means of their keys and values."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.kernels.decode_attention import slot_logits
from kvx.kernels.merge_partials import Partial
from kvx.pytree import pytree
from kvx.query import Query
from kvx.rotary import Rotary
from kvx.stores.base import nbytes
from kvx.tokens import Tokens, attended_values


@pytree
class MeanSlot:
    """Running means of rotated keys and values, read as `count` tokens that are all alike (RazorAttention, eq. 4, 5).

        out = v_mean,    lse = q . k_mean * scale + log count

    Exact where the keys are equal, whatever the values; otherwise it gives its tokens too little mass, never too much,
    since exp of a mean is at most the mean of exp. Nothing can be taken out again.

    `dense()` shows one token at the newest position it stands for; `count`, which multiplies its weight, is beside it.
    Bytes per KV head: 4 * (D + V) for the means, 4 for the count, 4 for the position.

    Attributes:
        key, value: means, float32.
        count: how many tokens they are of; 0: empty.
        newest: the highest true position among them, -1 where empty. A sliding window sees all of them or none by it.
    """

    key: Float[Array, "B G D"]
    value: Float[Array, "B G V"]
    count: Int[Array, "B G"]
    newest: Int[Array, "B G"]
    rotary: Rotary

    @classmethod
    def pack(cls, tokens: Tokens, mask: Bool[Array, "B G T"]) -> "MeanSlot":
        """The means of the tokens in `mask`."""
        batch, heads = mask.shape[:2]
        empty = cls(
            jnp.zeros((batch, heads, tokens.keys.shape[-1]), jnp.float32),
            jnp.zeros((batch, heads, tokens.values.shape[-1]), jnp.float32),
            jnp.zeros((batch, heads), jnp.int32),
            jnp.full((batch, heads), -1, jnp.int32),
            tokens.rotary,
        )
        return empty.append(replace(tokens, positions=jnp.where(mask, tokens.positions, -1)))

    def append(self, tokens: Tokens) -> "MeanSlot":
        """Any number of tokens at once."""
        arrived = jnp.sum(tokens.present, axis=-1, dtype=jnp.int32)
        count = self.count + arrived
        share = (1 / jnp.maximum(count, 1))[..., None]

        def moved(mean: Float[Array, "B G W"], rows: Float[Array, "B G T W"]) -> Float[Array, "B G W"]:
            # By differences to the mean, so that a mean of many does not lose what the next token adds.
            apart = rows.astype(jnp.float32) - mean[:, :, None]
            return mean + share * jnp.sum(jnp.where(tokens.present[..., None], apart, 0.0), axis=2)

        return replace(
            self,
            key=moved(self.key, tokens.rotated_keys),
            value=moved(self.value, tokens.values),
            count=count,
            newest=jnp.maximum(self.newest, jnp.max(jnp.where(tokens.present, tokens.positions, -1), axis=-1)),
        )

    def read(self, query: Query) -> Partial:
        lse = self._weights(query)
        value = attended_values(self.key, self.value, self.rotary)
        out = jnp.broadcast_to(value[:, :, None, None], (*lse.shape, value.shape[-1]))
        return Partial(jnp.where(jnp.isfinite(lse)[..., None], out, 0.0), lse)

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        """Of all its tokens together."""
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.exp(self._weights(query) - finite)[..., None]

    def tokens(self) -> Tokens:
        return Tokens(self.key[:, :, None], self.value[:, :, None], self.positions(), self.rotary)

    def positions(self) -> Int[Array, "B G C"]:
        return self.newest[..., None]

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.attended_values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return {}

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "MeanSlot":
        return self

    def bytes_read(self) -> int:
        return nbytes(self)

    def _weights(self, query: Query) -> Float[Array, "B G R T"]:
        """Logits with the logarithm of the count; -inf where empty or not visible."""
        keys = self.key[:, :, None]
        logits = slot_logits(query.rotated, keys, query.positions, self.newest[..., None], **query.masking)
        return logits.reshape(query.raw.shape[:4]) + jnp.log(self.count.astype(jnp.float32))[..., None, None]
