"""The cache: one immutable pytree that a model's whole past is."""

from dataclasses import replace
from typing import Any

import jax
from jaxtyping import Array, Int

from kvx.pytree import pytree
from kvx.stores.base import nbytes
from kvx.stores.host import HOST

ENDLESS = 2**31 - 1
"""Room of a cache whose policy keeps it within its budget however long the generation."""


@pytree
class KVCache:
    """Storage, the map from layers to it, policy states, and each row's next true position.

    Attributes:
        storage: stores and pools; layers may share one.
        places: where each layer's store lives in the storage.
        states: what each layer's policy stages carry between steps.
        next: the true position of the next token of each row.
        room: decode steps for which there are slots; `ENDLESS` under a bounded policy.
    """

    storage: tuple[Any, ...]
    places: tuple[Any, ...]
    states: tuple[tuple[Any, ...], ...]
    next: Int[Array, "B"]
    room: Int[Array, ""]

    @property
    def layers(self) -> tuple[Any, ...]:
        """Every layer's store: `.positions()`, `.dense()`, `.stats`."""
        return tuple(where.load(self.storage) for where in self.places)

    def crop(self, next: Int[Array, "B"]) -> "KVCache":
        """Without the tokens at or beyond these positions, which are each row's next ones; `room` stays.

        Where `Policy.undoes` allows it.
        """
        return replace(self, storage=tuple(store.crop(next) for store in self.storage), next=next)

    def narrow(self, on: bool = True) -> "KVCache":
        """The view to draft with, or (not `on`) the whole one again; no array changes. Where `Policy.narrows`."""
        return replace(self, storage=tuple(store.narrow(on) for store in self.storage))

    @property
    def nbytes(self) -> int:
        """Resident bytes: the sum of all arrays' `nbytes`, positions, scales, statistics and states included."""
        return nbytes(self)

    @property
    def host_nbytes(self) -> int:
        """Of these, the bytes that lie in host memory, beside the device; by where the arrays are."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self) if leaf.sharding.memory_kind == HOST)

    def bytes_moved(self) -> int:
        """Bytes that the last decode step brought from the host to the device."""
        return sum(int(store.bytes_moved()) for store in self.layers if hasattr(store, "bytes_moved"))

    def bytes_read(self) -> int:
        """Bytes of the cache that one decode step touches; less than `nbytes` for sparse reads."""
        return sum(int(store.bytes_read()) for store in self.layers)
