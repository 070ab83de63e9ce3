"""A section of a configuration: a frozen dataclass that checks its own types and ranges when it is built."""

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from kvx.errors import BadInput


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an open end excludes its number."""

    low: int | float = -math.inf
    high: int | float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: int | float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'of at least'} {_digits(self.low)}"
        high = f"{'below' if self.open_high else 'of at most'} {_digits(self.high)}"
        ends = ([low] if math.isfinite(self.low) else []) + ([high] if math.isfinite(self.high) else [])
        return " and ".join(ends)


Count = Annotated[int, Range(1)]
"""One or more."""
Whole = Annotated[int, Range(0)]
"""0 or more."""
Weight = Annotated[float, Range(0)]
"""0 or more, finite."""
Positive = Annotated[float, Range(0, open_low=True)]
"""Above 0, finite."""
Share = Annotated[float, Range(0, 1, open_high=True)]
"""A part of a whole, less than all of it."""


@dataclass(frozen=True)
class Section:
    """What every section of a configuration is: `kvx.section_file` reads it, and building it checks it.

    Raises:
        BadInput: a value of a wrong type or out of its range, by the annotations of its fields.
    """

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            value = getattr(self, name)
            if not accepts(value, hint):
                raise BadInput(f"{name}={value!r}; allowed: {allowed(hint)}")


def hints(section: type[Section]) -> dict[str, Any]:
    """A section's fields and what each may be, in their order."""
    known = get_type_hints(section, include_extras=True)
    return {field.name: known[field.name] for field in fields(section)}


def accepts(value: Any, hint: Any) -> bool:
    """Whether a value may stand for an annotation: its type, its range, each of its entries."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return accepts(value, inner[0]) and all(value in limit for limit in inner[1:])
    if origin in (Union, types.UnionType):
        return any(accepts(value, each) for each in inner)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin is tuple:
        return isinstance(value, tuple) and _matches(value, inner)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint or types.NoneType)


def allowed(hint: Any) -> str:
    """What an annotation admits, as the end of a refusal."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([allowed(inner[0]), *map(str, inner[1:])])
    if origin in (Union, types.UnionType):
        return _or(allowed(each) for each in inner if each is not types.NoneType)
    if origin is Literal:
        return _or(map(repr, inner))
    if origin is tuple:
        every = inner[-1] is Ellipsis
        return f"a list, each {allowed(inner[0])}" if every else f"a list of {len(inner)}, each {allowed(inner[0])}"
    if origin is Mapping or (isinstance(hint, type) and issubclass(hint, Section)):
        return "a table"
    return {int: "an integer", float: "a finite number", str: "a text", bool: "true or false"}[hint]


def _digits(value: int | float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _matches(value: tuple, inner: tuple) -> bool:
    if inner[-1] is Ellipsis:
        return all(accepts(each, inner[0]) for each in value)
    return len(value) == len(inner) and all(map(accepts, value, inner))


def _or(parts: Iterator[str] | Any) -> str:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " or " + parts[-1]
