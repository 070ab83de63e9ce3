"""Evidence: what a policy may look at, asked for statically so that attention computes only what somebody reads."""

from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Array, Float, Int

from kvx.kernels.prefill_attention.columns import Column
from kvx.pytree import pytree


@dataclass(frozen=True)
class Requests:
    """What a policy needs to see in one phase; the union of several is `a | b`.

    Attributes:
        rows: probabilities of each row's last `rows` queries (at a decode step: of the one new query if >= 1).
        columns: statistics over all queries; prefill only.
        query: the channel maxima of all queries; prefill only.
        queries: every new token's rotated queries.
        marks: integers that come with each token, among its statistics: "id" (its token id) and "label" (what the
            caller gave as `labels`; GENERATED for a token without one).
    """

    rows: int = 0
    columns: frozenset[Column] = frozenset()
    query: bool = False
    queries: bool = False
    marks: frozenset[str] = frozenset()

    def __or__(self, other: "Requests") -> "Requests":
        return Requests(
            max(self.rows, other.rows),
            self.columns | other.columns,
            self.query or other.query,
            self.queries or other.queries,
            self.marks | other.marks,
        )


NOTHING = Requests()
"""The request for no evidence at all."""

MARKS = frozenset({"id", "label"})
"""Integers that come with each token, if a policy asks for them."""

GENERATED = -1
"""The label of a token that the caller gave none: one that came after the prompt."""


@pytree
class Evidence:
    """What attention saw, per query head (a policy reduces over a group by name); arrays nobody asked for are None.

    Slots are those of the tokens at hand: at prefill all tokens that compete, at a decode step the store's `dense()`
    order.

    Attributes:
        seen: tokens of each row seen so far, the newest included: the next true position.
        rows: probabilities of the last queries, newest last; a query before the row's first is all zeros.
        columns: statistics over the queries since the last decision.
        query_peak: largest magnitude of each query channel over the prompt, rotated, per KV head.
        queries: rotated queries of the newest T tokens at hand, in order; T = 1 at a decode step.
    """

    seen: Int[Array, "B"]
    rows: Float[Array, "B G R W S"] | None = None
    columns: dict[Column, Float[Array, "B G R S"]] = field(default_factory=dict)
    query_peak: Float[Array, "B G D"] | None = None
    queries: Float[Array, "B G R T D"] | None = None

    def only(self, requests: Requests) -> "Evidence":
        """What was asked for, of the evidence of a whole prompt."""
        rows = self.rows
        if rows is not None and requests.rows < rows.shape[-2]:
            rows = rows[..., -requests.rows :, :] if requests.rows else None
        return replace(
            self,
            rows=rows,
            columns={column: found for column, found in self.columns.items() if column in requests.columns},
            query_peak=self.query_peak if requests.query else None,
            queries=self.queries if requests.queries else None,
        )

    def heads(self, index: Int[Array | np.ndarray, "_"]) -> "Evidence":
        """What was seen of these KV heads."""

        def some(array):
            return None if array is None else array[:, index]

        return Evidence(
            self.seen,
            some(self.rows),
            {column: found[:, index] for column, found in self.columns.items()},
            some(self.query_peak),
            some(self.queries),
        )

    def last_rows(self, count: int) -> Float[Array, "B G R W S"]:
        """The newest `count` rows; more may be there, since policies that share a pass share its evidence."""
        assert self.rows is not None, "a score read rows that its observe() did not ask for"
        return self.rows[..., -count:, :]
