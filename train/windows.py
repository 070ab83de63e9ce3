"""Batches of fixed windows of a pre-tokenised text, in memory: for runs that need no tokenizer and no pipeline."""

from typing import Any

import numpy as np
from jaxtyping import Integer

from kvx.errors import BadInput
from kvx.train.batch import Batch


class Windows:
    """Rows of `length` tokens without overlap, each epoch in an order of its own; endless, and able to go back.

    Every token after a row's first is predicted; a row is one document.

    Args:
        tokens: of the text.
        length: of a row.
        rows: of a batch.
        seed: of the order; None: as they come, epoch after epoch.
        share, shares: which part of every batch's rows is this process's, and how many parts there are.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, "N"],
        length: int,
        rows: int,
        seed: int | None = 0,
        share: int = 0,
        shares: int = 1,
    ):
        count = len(tokens) // length
        if count < rows:
            raise BadInput(f"the text has {len(tokens)} tokens; allowed: at least {rows * length}, one batch")
        self._rows = np.asarray(tokens[: count * length]).reshape(count, length)
        self._batch, self._seed, self._share, self._shares = rows, seed, share, shares
        self._taken = 0

    def __iter__(self) -> "Windows":
        return self

    def __next__(self) -> Batch:
        each = len(self._rows) // self._batch
        epoch, place = divmod(self._taken, each)
        order = np.arange(len(self._rows))
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        self._taken += 1
        mine = self._batch // self._shares
        first = place * self._batch + self._share * mine
        return window_batch(self._rows[order[first : first + mine]])

    def get_state(self) -> dict[str, Any]:
        """Batches taken."""
        return {"taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """As after so many batches."""
        self._taken = int(state["taken"])


def held_out(tokens: Integer[np.ndarray, "N"], length: int, rows: int, count: int) -> list[Batch]:
    """The first batches of a text in order, at most `count` tokens of them; one batch at least."""
    windows = Windows(tokens, length, rows, seed=None)
    batches = max(1, min(count, len(tokens)) // (length * rows))
    return [next(windows) for _ in range(batches)]


def window_batch(rows: Integer[np.ndarray, "B T"]) -> Batch:
    """Rows of one document each."""
    tokens = rows.astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens, np.ones_like(tokens), positions, np.ones(tokens.shape, bool), packed=False)
