"""Tokens: keys, values and true positions of any number of tokens per KV head, with statistics that travel along."""

from collections.abc import Iterable, Mapping
from dataclasses import field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.pytree import pytree, static
from kvx.rotary import Rotary


@pytree
class Tokens:
    """Tokens of one layer, on their way into a store or out of one.

    Attributes:
        keys: rotated at their true positions if `rotated`, else as the model projected them.
        values: values; of width 0 where channels of the keys are the values (`attended_values`).
        positions: true positions; -1 marks "no token" (padding, an empty slot, a row that has ended).
        stats: numbers that a policy keeps with each token, by name (float32 or integers).
        rotary: this layer's rotation.
        rotated: static; which form `keys` is in.
    """

    keys: Float[Array, "B G T D"]
    values: Float[Array, "B G T V"]
    positions: Int[Array, "B G T"]
    rotary: Rotary
    stats: Mapping[str, Shaped[Array, "B G T"]] = field(default_factory=dict)
    rotated: bool = static(True)

    @property
    def rotated_keys(self) -> Float[Array, "B G T D"]:
        """Keys rotated at their true positions."""
        return self.keys if self.rotated else self.rotary(self.keys, self.positions)

    @property
    def raw_keys(self) -> Float[Array, "B G T D"]:
        """Keys before rotation; exact if the tokens carry them so, else turned back in float32."""
        return self.rotary.back(self.keys, self.positions) if self.rotated else self.keys

    @property
    def attended_values(self) -> Float[Array, "B G T V"]:
        """What attention mixes."""
        return attended_values(self.keys, self.values, self.rotary)

    @property
    def present(self) -> Bool[Array, "B G T"]:
        """Where there is a token."""
        return self.positions >= 0

    def take(self, indices: Int[Array, "B G N"], present: Bool[Array, "B G N"]) -> "Tokens":
        """The tokens at `indices` per KV head; entries that are not `present` become "no token"."""
        rows = indices[..., None]
        return replace(
            self,
            keys=jnp.take_along_axis(self.keys, rows, axis=2),
            values=jnp.take_along_axis(self.values, rows, axis=2),
            positions=jnp.where(present, jnp.take_along_axis(self.positions, indices, axis=2), -1),
            stats={name: jnp.take_along_axis(stat, indices, axis=2) for name, stat in self.stats.items()},
        )

    def select(self, mask: Bool[Array, "B G T"], capacity: int) -> "Tokens":
        """The tokens in `mask`, in order, gathered to the front of `capacity` entries; the rest is "no token"."""
        mask = mask & self.present
        length = mask.shape[-1]
        target = jnp.where(mask, jnp.cumsum(mask, axis=-1) - 1, capacity)
        batch, heads = jnp.ogrid[: mask.shape[0], : mask.shape[1]]
        source = jnp.zeros((*mask.shape[:2], capacity), jnp.int32)
        source = source.at[batch[..., None], heads[..., None], target].set(
            jnp.arange(length, dtype=jnp.int32), mode="drop"
        )
        return self.take(source, jnp.arange(capacity) < jnp.sum(mask, axis=-1, keepdims=True))

    def heads(self, index: Int[Array | np.ndarray, "H"]) -> "Tokens":
        """The tokens of these KV heads."""
        return replace(
            self,
            keys=self.keys[:, index],
            values=self.values[:, index],
            positions=self.positions[:, index],
            stats={name: stat[:, index] for name, stat in self.stats.items()},
        )

    def with_only(self, names: Iterable[str]) -> "Tokens":
        """The same tokens with these statistics and no others; what is not there is left out."""
        return replace(self, stats={name: self.stats[name] for name in sorted(names) if name in self.stats})

    def pad(self, capacity: int) -> "Tokens":
        """The same tokens followed by "no token" up to `capacity` entries."""
        missing = capacity - self.positions.shape[-1]

        def widen(array, fill):
            widths = [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 3)
            return jnp.pad(array, widths, constant_values=fill)

        return replace(
            self,
            keys=widen(self.keys, 0),
            values=widen(self.values, 0),
            positions=widen(self.positions, -1),
            stats={name: widen(stat, 0) for name, stat in self.stats.items()},
        )

    def astype(self, dtype: jax.typing.DTypeLike | None) -> "Tokens":
        """Keys and values in `dtype` (None: as they are)."""
        return self if dtype is None else replace(self, keys=self.keys.astype(dtype), values=self.values.astype(dtype))

    def with_form(self, rotated: bool) -> "Tokens":
        """The same tokens with keys in the named form."""
        return replace(self, keys=self.rotated_keys if rotated else self.raw_keys, rotated=rotated)


def attended_values(
    keys: Float[Array, "*batch D"], values: Float[Array, "*batch V"], rotary: Rotary
) -> Float[Array, "*batch W"]:
    """What attention mixes: the values, or, where nothing is kept as such, the channels of the keys that do not turn.

    So a token of latent attention (DeepSeek-V2 2024) is kept once: as key, whose latent is the value too.
    """
    return values if values.shape[-1] else keys[..., rotary.width :]


def held_values(values: Float[Array, "*batch V"]) -> Float[Array, "*batch V"] | None:
    """As an attention operation takes them: None where nothing is kept as values, and channels of the keys are."""
    return values if values.shape[-1] else None


def concatenate(first: Tokens, second: Tokens) -> Tokens:
    """Two runs of tokens of one layer, one after the other; statistics that only one has start at zero."""
    second = second.with_form(first.rotated)
    names = {*first.stats, *second.stats}

    def stat(tokens: Tokens, name: str) -> Shaped[Array, "B G T"]:
        kind = (first.stats.get(name, second.stats.get(name))).dtype  # type: ignore[union-attr]
        return tokens.stats.get(name, jnp.zeros(tokens.positions.shape, kind))

    return replace(
        first,
        keys=jnp.concatenate([first.keys, second.keys], axis=2),
        values=jnp.concatenate([first.values, second.values.astype(first.values.dtype)], axis=2),
        positions=jnp.concatenate([first.positions, second.positions], axis=2),
        stats={name: jnp.concatenate([stat(first, name), stat(second, name)], axis=2) for name in sorted(names)},
    )
