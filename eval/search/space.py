"""The space that is searched: a selection and a store of the registry, and their parameters, as policy texts.

It is derived: a method's parameters are its signature's, their values those of `ranges`, and whether it may be followed
by another is what its stages say. A chain that cannot be is kvx's to refuse.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvx.errors import BadInput, unknown
from kvx.eval.search.ranges import RANGES, Grid, Key
from kvx.policies.registry import find, names

Pick = Callable[[str, Grid], Any]
"""Draws one value of a grid, which is addressed by a name; the same name always comes with the same grid."""

Choice = Mapping[str, int]
"""A point of the space: by name, the index of what was picked."""

NOTHING = "nothing"


@dataclass(frozen=True)
class Method:
    """A named method.

    Attributes:
        name: in the registry.
        parameters: what is tried, by parameter; the others keep their defaults.
        stores: it says how tokens are kept, so that it comes last in a chain.
        alone: nothing can be chained with it.
    """

    name: str
    parameters: Mapping[str, tuple[Key, Grid]]
    stores: bool
    alone: bool

    def text(self, values: Mapping[str, Any]) -> str:
        """The call with these values, those that are the method's defaults left out."""
        defaults = inspect.signature(find(self.name)).parameters
        told = [
            f"{name}={value!r}"
            for name, value in values.items()
            if type(value) is not type(defaults[name].default) or value != defaults[name].default
        ]
        return f"{self.name}({', '.join(told)})" if told else self.name


@dataclass(frozen=True)
class Space:
    """Methods and their chains.

    Attributes:
        selections: which tokens stay; a method that stands alone is among them.
        stores: how they are kept.
        left_out: methods that are not searched, each with the reason.
    """

    selections: tuple[Method, ...]
    stores: tuple[Method, ...]
    left_out: Mapping[str, str]

    @classmethod
    def of(cls, only: Sequence[str] = (), without: Sequence[str] = ()) -> "Space":
        """All methods of the registry, or some.

        Args:
            only: names; none: all.
            without: names to leave out.

        Raises:
            BadInput: a name that no method has, or nothing left.
        """
        for name in (*only, *without):
            if name not in names():
                raise unknown("policy", name, names())
        chosen = [name for name in names() if (not only or name in only) and name not in without]
        methods, left_out = [], {}
        for name in chosen:
            try:
                found = _method(name)
            except BadInput as error:
                left_out[name] = str(error)
                continue
            methods += [] if found is None else [found]
        if not methods:
            raise BadInput(
                f"only={list(only)}, without={list(without)} leave no policy to search; allowed: names of kvx policies"
            )
        stores = tuple(each for each in methods if each.stores and not each.alone)
        return cls(tuple(each for each in methods if each not in stores), stores, left_out)

    @property
    def methods(self) -> tuple[Method, ...]:
        """All of them."""
        return (*self.selections, *self.stores)

    def but(self, refused: Mapping[str, str]) -> "Space":
        """Without some methods, each with the reason."""

        def kept(part: tuple[Method, ...]) -> tuple[Method, ...]:
            return tuple(each for each in part if each.name not in refused)

        return Space(kept(self.selections), kept(self.stores), {**self.left_out, **refused})

    def draw(self, pick: Pick) -> str:
        """One policy's text, from what is picked for every question in turn."""
        selection = self._one("selection", self.selections, pick)
        store = None if selection is not None and selection.alone else self._one("store", self.stores, pick)
        parts = [
            method.text({name: pick(address, grid) for name, (address, grid) in questions.items()})
            for method, questions in _questions(selection, store)
        ]
        return "+".join(parts) or "full"

    def at(self, choice: Choice) -> str:
        """The policy's text at a point."""
        return self.draw(lambda name, grid: grid.values[choice[name]])

    def point(self, *methods: Method, share: float | None = None) -> Choice:
        """The point of one method alone, or of a selection and a store.

        Args:
            share: with the values of their papers, and where a budget has to be named the largest share of the prompt
                that is not above this one; None: with the first value of every grid, those of the fewest bytes.
        """
        selection = next((each for each in methods if each in self.selections), None)
        store = next((each for each in methods if each in self.stores), None)
        choice = {
            "selection": 0 if selection is None else 1 + self.selections.index(selection),
            "store": 0 if store is None else 1 + self.stores.index(store),
        }
        for method, questions in _questions(selection, store):
            defaults = inspect.signature(find(method.name)).parameters
            for name, (address, grid) in questions.items():
                index = 0 if share is None else grid.index(defaults[name].default)
                if index is None:
                    index = max((at for at, value in enumerate(grid.values) if value <= share), default=0)
                choice[address] = index
        return choice

    @staticmethod
    def _one(role: str, methods: tuple[Method, ...], pick: Pick) -> Method | None:
        by_name = {each.name: each for each in methods}
        return by_name.get(pick(role, Grid((NOTHING, *by_name), ordered=False)))


def _questions(selection: Method | None, store: Method | None) -> list[tuple[Method, dict[str, tuple[str, Grid]]]]:
    """What is asked about each method of a policy: by parameter, under which address, and the grid.

    Methods of one role share what they call by one name and annotate alike, so that what is learned of one serves the
    others. In a chain it is another question: bytes multiply, and values that are best alone are not best together.
    """
    asked = []
    for role, method in (("selection", selection), ("store", store)):
        if method is not None:
            place = role if None in (selection, store) else f"{role} in a chain"
            named = {
                name: (f"{place}: {name}, {_shown(key[1])}", grid) for name, (key, grid) in method.parameters.items()
            }
            asked.append((method, named))
    return asked


def _shown(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _method(name: str) -> Method | None:
    """A method as its signature and its stages describe it; None for one without stages, which is no method.

    Raises:
        BadInput: a parameter that has to be given, but for which there is no range; or no values that it accepts.
    """
    signature = inspect.signature(find(name)).parameters
    grids: dict[str, tuple[Key, Grid]] = {}
    for each in signature.values():
        key, required = (each.name, each.annotation), each.default is inspect.Parameter.empty
        if key in RANGES and (required or RANGES[key].index(each.default) is not None):
            grids[each.name] = key, RANGES[key]
        elif required:
            raise BadInput(f"{name} needs {each.name}, for which the search has no values; allowed: defaults, or a row")
    built = _some(name, grids)
    if not built.stages:
        return None
    alone = any(stage.unchained for stage in built.stages)
    return Method(name, grids, any(stage.stores for stage in built.stages), alone)


def _some(name: str, grids: Mapping[str, tuple[Key, Grid]]) -> Any:
    """The method with its defaults, and with the largest value of each parameter that has none."""
    signature = inspect.signature(find(name)).parameters
    needed = {
        each: grid.values[-1] for each, (_, grid) in grids.items() if signature[each].default is inspect.Parameter.empty
    }
    return find(name)(**needed)
