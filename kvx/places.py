"""Places: which storage a layer's cache lives in. Layers may own theirs, or share one; the map is part of the cache."""

from functools import singledispatch
from typing import Any, Protocol, runtime_checkable

from kvx.pytree import pytree, static


@runtime_checkable
class Place(Protocol):
    """How to get at a layer's store in the cache's storage, and how to put it back."""

    @property
    def shared(self) -> bool:
        """Whether the next layers may add to that slot while the cache is made; its newest place has the say."""
        ...

    @property
    def slot(self) -> int:
        """Where in the storage."""
        ...

    def load(self, storage: tuple[Any, ...]) -> Any:
        """The layer's store."""
        ...

    def save(self, storage: tuple[Any, ...], store: Any) -> tuple[Any, ...]:
        """Storage that holds the changed store."""
        ...


@pytree
class Own:
    """A storage slot of its own; several layers with the same slot share one store."""

    slot: int = static()

    @property
    def shared(self) -> bool:
        return False

    def load(self, storage: tuple[Any, ...]) -> Any:
        return storage[self.slot]

    def save(self, storage: tuple[Any, ...], store: Any) -> tuple[Any, ...]:
        return (*storage[: self.slot], store, *storage[self.slot + 1 :])


@singledispatch
def place(store: Any, storage: tuple[Any, ...]) -> tuple[Place, tuple[Any, ...]]:
    """Where a newly packed store goes, and the storage that then holds it. Stores that share arrays register here."""
    return Own(len(storage)), (*storage, store)
