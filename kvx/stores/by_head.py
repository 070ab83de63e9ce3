"""The store by head: several stores, each for some of a layer's KV heads, that answer as one."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from kvx.kernels.merge_partials import Partial
from kvx.pytree import pytree
from kvx.query import Query
from kvx.tokens import Tokens


@pytree
class HeadSplit:
    """Which KV heads are in which part: sizes are static, members are data, so that equal sizes share a program.

    Attributes:
        members: the KV heads of each part; together every head once.
        held_whole: class attribute; on a mesh every device holds all of it, though its length may equal the rows.
    """

    members: tuple[Int[Array | np.ndarray, "_"], ...]
    held_whole: ClassVar[bool] = True

    def parts(self, array: Shaped[Array, "B G *rest"]) -> list[Shaped[Array, "B _ *rest"]]:
        """The array's heads, part by part."""
        return [array[:, heads] for heads in self.members]

    def join(self, parts: Sequence[Shaped[Array, "B _ *rest"]]) -> Shaped[Array, "B G *rest"]:
        """The inverse of `parts`."""
        return jnp.concatenate(parts, axis=1)[:, jnp.argsort(jnp.concatenate(self.members))]

    def join_tokens(self, parts: Sequence[Tokens]) -> Tokens:
        """Tokens of every part as one rectangle: shorter parts are padded, missing statistics are zero."""
        first, most = parts[0], max(part.positions.shape[-1] for part in parts)
        padded = [part.with_form(first.rotated).pad(most) for part in parts]
        kinds = {name: stat.dtype for part in padded for name, stat in part.stats.items()}

        def stat(name: str) -> Shaped[Array, "B G T"]:
            nothing = [jnp.zeros(part.positions.shape, kinds[name]) for part in padded]
            return self.join([part.stats.get(name, zero) for part, zero in zip(padded, nothing, strict=True)])

        return replace(
            first,
            keys=self.join([part.keys for part in padded]),
            values=self.join([part.values for part in padded]),
            positions=self.join([part.positions for part in padded]),
            stats={name: stat(name) for name in sorted(kinds)},
        )


@pytree
class ByHead:
    """Stores of any kind and size, one for each part of the heads; bytes are the sum of theirs and 4 a KV head.

    Slots are shown as one rectangle, as wide as the widest store, at position -1 where a head has fewer. Whoever frees
    slots does so in `stores`, since what can leave is theirs to know.

    Attributes:
        stores: one for each part; their arrays have as many heads as it.
        split: the parts.
    """

    stores: tuple[Any, ...]
    split: HeadSplit

    @property
    def sizes(self) -> tuple[int, ...]:
        """Slots of each store."""
        return tuple(store.positions().shape[-1] for store in self.stores)

    def append(self, tokens: Tokens) -> "ByHead":
        return replace(
            self,
            stores=tuple(
                store.append(tokens.heads(heads)) for store, heads in zip(self.stores, self.split.members, strict=True)
            ),
        )

    def read(self, query: Query) -> Partial:
        parts = [store.read(query.heads(heads)) for store, heads in zip(self.stores, self.split.members, strict=True)]
        return Partial(self.split.join([part.out for part in parts]), self.split.join([part.lse for part in parts]))

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        return self.split.join(
            [
                _widen(store.probabilities(query.heads(heads), part), max(self.sizes), 0)
                for store, heads, part in zip(self.stores, self.split.members, self.split.parts(lse), strict=True)
            ]
        )

    def tokens(self) -> Tokens:
        return self.split.join_tokens([store.tokens() for store in self.stores])

    def positions(self) -> Int[Array, "B G C"]:
        return self.split.join([_widen(store.positions(), max(self.sizes), -1) for store in self.stores])

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        keys, values, positions = zip(*(store.dense() for store in self.stores), strict=True)
        widen = partial(_widen, width=max(self.sizes), axis=2)
        return (
            self.split.join([widen(part, fill=0) for part in keys]),
            self.split.join([widen(part, fill=0) for part in values]),
            self.split.join([widen(part, fill=-1) for part in positions]),
        )

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return dict(self.tokens().stats)

    def with_stats(self, stats: dict[str, Shaped[Array, "B G C"]]) -> "ByHead":
        split = {name: self.split.parts(stat) for name, stat in stats.items()}
        return replace(
            self,
            stores=tuple(
                store.with_stats({name: split[name][index][..., :size] for name in store.stats})
                for index, (store, size) in enumerate(zip(self.stores, self.sizes, strict=True))
            ),
        )

    def bytes_read(self) -> int | Float[Array, ""]:
        return sum(store.bytes_read() for store in self.stores)


def _widen(array: Shaped[Array, "..."], width: int, fill: int, axis: int = -1) -> Shaped[Array, "..."]:
    """The array padded with `fill` along an axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, width - array.shape[axis])
    return jnp.pad(array, widths, constant_values=fill)
