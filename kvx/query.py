"""Queries as stores receive them: unrotated, with their true positions, so that a store rotates by its own rule."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvx.decoder import AttentionSpec
from kvx.kernels.decode_attention import decode_attention
from kvx.kernels.decode_attention.operands import Operand, Rows
from kvx.kernels.latent_decode_attention import latent_decode_attention
from kvx.kernels.latent_decode_attention.operands import Rows as LatentRows
from kvx.kernels.merge_partials import Partial
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes
from kvx.pytree import pytree, static
from kvx.rotary import Rotary


@pytree
class Query:
    """The queries of T new tokens, grouped by the KV head they read.

    Attributes:
        raw: before rotation, R = H / G query heads for each KV head.
        positions: true positions; -1 marks padding.
        rotary: this layer's rotation.
        spec: static facts of this layer's attention.
    """

    raw: Float[Array, "B G R T D"]
    positions: Int[Array, "B T"]
    rotary: Rotary
    spec: AttentionSpec = static()

    @classmethod
    def from_heads(
        cls, heads: Float[Array, "B T H D"], positions: Int[Array, "B T"], rotary: Rotary, spec: AttentionSpec
    ) -> "Query":
        """Group projected queries by KV head."""
        batch, length, _, dim = heads.shape
        grouped = heads.reshape(batch, length, spec.kv_heads, spec.group, dim)
        return cls(jnp.transpose(grouped, (0, 2, 3, 1, 4)), positions, rotary, spec)

    def heads(self, index: Int[Array | np.ndarray, "_"]) -> "Query":
        """The queries of these KV heads, under a spec of so many."""
        return replace(self, raw=self.raw[:, index], spec=self.spec.only(len(index)))

    @property
    def rotated(self) -> Float[Array, "B G R T D"]:
        """Rotated at the true positions."""
        return self.rotary(self.raw, self.positions[:, None, None, :])

    def at(self, positions: Int[Array, "B G T"]) -> Float[Array, "B G R T D"]:
        """Rotated at positions of the store's choosing."""
        return self.rotary(self.raw, positions[:, :, None, :])

    def attend(
        self,
        keys: Float[Array, "B G C D"] | Operand,
        values: Float[Array, "B G C V"] | Operand,
        slots: Int[Array, "B G C"],
        rotated: Float[Array, "B G R T D"] | None = None,
    ) -> Partial:
        """Partial attention over slots of rotated keys at these true positions, -1 where empty.

        Args:
            values: of width 0 where channels of the keys are the values.
            rotated: the queries as the store rotates them; None: at their true positions.
        """
        if self.spec.latent:
            assert not isinstance(keys, ChannelCodes | TokenCodes), "coded latents are rows of their own kind"
            rows = keys if isinstance(keys, Rows) else Rows(keys)
            return self.attend_rows(rows.array[:, 0], slots[:, 0], rotated, slots_last=rows.slots_last)
        queries = self.rotated if rotated is None else rotated
        return decode_attention(queries, keys, values, self.positions, slots, **self.masking)

    def attend_rows(
        self,
        rows: LatentRows,
        slots: Int[Array, "B C"],
        rotated: Float[Array, "B G R T D"] | None = None,
        *,
        slots_last: bool = False,
    ) -> Partial:
        """As `attend`, of latent attention: over rows [rotary key ; latent], plain or with a coded latent."""
        queries = jnp.swapaxes((self.rotated if rotated is None else rotated)[:, 0], 1, 2)
        part = latent_decode_attention(
            queries,
            rows,
            self.positions,
            slots,
            value_dim=self.spec.value_dim,
            slots_last=slots_last,
            **self.masking,
        )
        return Partial(jnp.swapaxes(part.out, 1, 2)[:, None], jnp.swapaxes(part.lse, 1, 2)[:, None])

    @property
    def masking(self) -> dict:
        """The keyword arguments of the attention operations that follow from the layer's spec."""
        return {"scale": self.spec.scale, "window": self.spec.window, "softcap": self.spec.softcap}


def to_heads(out: Float[Array, "B G R T V"]) -> Float[Array, "B T H V"]:
    """Attention output by query head, as a model's `finish` takes it."""
    batch, kv_heads, group, length, width = out.shape
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(batch, length, kv_heads * group, width)
