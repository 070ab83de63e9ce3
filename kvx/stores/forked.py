"""The forked store: what several rows share is held and read once for all of them, what each adds is its own."""

from dataclasses import replace
from functools import reduce
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.pytree import pytree
from kvx.query import Query
from kvx.tokens import Tokens, concatenate


@pytree
class Shared:
    """A store of B_i rows that B rows read and nobody changes: row b reads its row b // (B / B_i).

    Attributes:
        lent: class attribute; its arrays may belong to other caches too, so they are never donated.
    """

    store: Any
    lent: ClassVar[bool] = True


@pytree
class Forked:
    """Rows that came from fewer: levels that they share, oldest first, and a store of their own.

    A level is read once for all its rows (Hydragen, Juravsky et al. 2024, section 3.2): their queries stand side by
    side as if they were one row's, so that keys are read once and the product is of matrices. Not causal among the
    queries: all of them come after the level's tokens, and true positions say the rest (windows, rows that ended).
    Levels and own tokens merge by log-sum-exp.

    Slots are shown level by level, then the row's own.

    Bytes: those of the levels, once each, and of the own store.
    """

    levels: tuple[Shared, ...]
    own: Any

    def append(self, tokens: Tokens) -> "Forked":
        return replace(self, own=self.own.append(tokens))

    def read(self, query: Query) -> Partial:
        parts = [
            Partial(_apart(part.out, len(query.positions)), _apart(part.lse, len(query.positions)))
            for level in self.levels
            for part in [level.store.read(_side_by_side(query, _rows(level.store)))]
        ]
        return merge_partials(*parts, self.own.read(query))

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        shared = [
            _apart(
                level.store.probabilities(_side_by_side(query, rows), _together(lse, rows)),
                len(query.positions),
            )
            for level in self.levels
            for rows in [_rows(level.store)]
        ]
        return jnp.concatenate([*shared, self.own.probabilities(query, lse)], axis=-1)

    def crop(self, next: Int[Array, "B"]) -> "Forked":
        """Without the rows' own tokens at or beyond these positions; what came before the fork stays."""
        return replace(self, own=self.own.crop(next))

    def fork(self, copies: int) -> "Forked":
        """Every row `copies` times: its own tokens become one more level."""
        return replace(self.own.fork(copies), levels=(*self.levels, Shared(self.own)))

    def tokens(self) -> Tokens:
        batch = len(self.own.positions())
        spread = [_spread(level.store.tokens(), batch) for level in self.levels]
        return reduce(concatenate, [*spread, self.own.tokens()])

    def positions(self) -> Int[Array, "B G C"]:
        batch = len(self.own.positions())
        shared = [level.store.positions() for level in self.levels]
        return jnp.concatenate(
            [*(jnp.repeat(each, batch // len(each), axis=0) for each in shared), self.own.positions()], axis=-1
        )

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.rotated_keys, tokens.attended_values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return {}

    def bytes_read(self) -> int | Int[Array, ""]:
        """Each level once, however many rows read it."""
        return sum((level.store.bytes_read() for level in self.levels), self.own.bytes_read())


def _rows(store: Any) -> int:
    return len(store.positions())


def _side_by_side(query: Query, rows: int) -> Query:
    """The queries of all rows that share one of `rows`, as that row's."""
    return replace(query, raw=_together(query.raw, rows), positions=query.positions.reshape(rows, -1))


def _together(array: Any, rows: int) -> Any:
    """(B, G, R, T, ...) as (rows, G, R, B / rows * T, ...)."""
    batch, heads, group, length, *rest = array.shape
    array = jnp.moveaxis(array.reshape(rows, batch // rows, heads, group, length, *rest), 1, 3)
    return array.reshape(rows, heads, group, batch // rows * length, *rest)


def _apart(array: Any, batch: int) -> Any:
    """The other way: (rows, G, R, B / rows * T, ...) as (B, G, R, T, ...)."""
    rows, heads, group, many, *rest = array.shape
    copies = batch // rows
    array = jnp.moveaxis(array.reshape(rows, heads, group, copies, many // copies, *rest), 3, 1)
    return array.reshape(batch, heads, group, many // copies, *rest)


def _spread(tokens: Tokens, batch: int) -> Tokens:
    """Each row's tokens for all that read them."""
    copies = batch // len(tokens.positions)

    def each(array):
        return jnp.repeat(array, copies, axis=0)

    return replace(tokens, keys=each(tokens.keys), values=each(tokens.values), positions=each(tokens.positions))
