"""Configuration files: TOML that may extend another file, overrides from the command line, the section they make."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from kvx.errors import BadInput, unknown
from kvx.section import Section, accepts, allowed, hints

Kind = TypeVar("Kind", bound=Section)


def read_section(kind: type[Kind], path: Path, overrides: Sequence[str] = ()) -> Kind:
    """The configuration that a file describes.

    Args:
        kind: what it is.
        path: a TOML file; `extends = "file"`, relative to it, names one whose values hold where it says nothing. That
            file may extend no other. Sections are merged; lists and tables of options are values, taken whole from one
            file or the other.
        overrides: "key.sub=value", the value as in TOML or a bare word, an entry of a list by its index; the last wins.

    Raises:
        BadInput: a file that cannot be read or is not TOML; an unknown key; a value that its section refuses.
    """
    table = _merged(path, kind)
    for text in overrides:
        _override(table, text)
    try:
        return section_from(kind, table)
    except BadInput as error:
        raise BadInput(f"{str(path)!r}: {error}") from None


def table_from(section: Section) -> dict[str, Any]:
    """A section as plain dicts and lists, without what is None: the inverse of `section_from`."""
    return {
        field.name: _plain(getattr(section, field.name))
        for field in fields(section)
        if getattr(section, field.name) is not None
    }


def section_from(kind: type[Kind], table: Mapping[str, Any], where: str = "") -> Kind:
    """A section from a parsed table; sections and lists of sections within it likewise.

    Args:
        where: what stands before a key in a refusal, such as "stages.0.".

    Raises:
        BadInput: an unknown key, with the nearest suggested; a missing one; a value that is refused.
    """
    known = hints(kind)
    for key in table:
        if key not in known:
            raise unknown("key", f"{where}{key}", [f"{where}{name}" for name in known])
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in table:
            raise BadInput(f"{where}{field.name} is missing; allowed: {allowed(known[field.name])}")
    values = {key: _value(known[key], value, f"{where}{key}") for key, value in table.items()}
    for key, value in values.items():
        if not accepts(value, known[key]):
            raise BadInput(f"{where}{key}={value!r}; allowed: {allowed(known[key])}")
    try:
        return kind(**values)
    except BadInput as error:
        # Most sentences begin with the key that they refuse, others say what is wrong with its value.
        begin = re.match(r"\w*", str(error))
        names_it = not where or (begin is not None and begin[0] in known)
        raise BadInput(f"{where}{error}" if names_it else f"{where[:-1]}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """A TOML value as what the annotation names: tables become sections, lists tuples, and 1 may stand for 1.0."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _value(inner[0], value, where)
    if origin in (Union, UnionType):
        known = [(_value(each, value, where), each) for each in inner]
        fitting = [one for one, each in known if accepts(one, each)]
        return next((one for one in fitting if type(one) is type(value)), fitting[0] if fitting else value)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(inner[0], each, f"{where}.{index}") for index, each in enumerate(value))
    if _is_section(hint) and isinstance(value, Mapping):
        return section_from(hint, value, f"{where}.")
    return float(value) if hint is float and type(value) is int else value


def _merged(path: Path, kind: type[Section]) -> dict[str, Any]:
    table = _read(path)
    below = table.pop("extends", None)
    if below is None:
        return table
    if not isinstance(below, str):
        raise BadInput(f"{str(path)!r}: extends={below!r}; allowed: the name of a file")
    base = _read(path.parent / below)
    if "extends" in base:
        raise BadInput(f"{str(path)!r} extends {below!r}, which extends another; allowed: one level")
    return _over(base, table, kind)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"config {str(path)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise BadInput(f"config {str(path)!r} is not UTF-8; allowed: a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"config {str(path)!r} is not TOML: {error}") from None


def _over(base: Mapping[str, Any], upper: Mapping[str, Any], kind: type[Section]) -> dict[str, Any]:
    """Two tables of a section in one; where both have a value, the upper one's."""
    known = hints(kind)
    merged = {**base, **upper}
    for key in base.keys() & upper.keys() & known.keys():
        if _is_section(known[key]) and isinstance(base[key], Mapping) and isinstance(upper[key], Mapping):
            merged[key] = _over(base[key], upper[key], known[key])
    return merged


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _override(table: dict[str, Any], text: str) -> None:
    """Set one value in the table, in place."""
    key, equals, value = text.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise BadInput(f"override {text!r}; allowed: key.sub=value")
    here: Any = table
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(here, list):
            if not step.isdecimal() or int(step) >= len(here):
                raise BadInput(f"override {text!r}: {step!r} is no index of a list; allowed: 0 to {len(here) - 1}")
            if last:
                here[int(step)] = _literal(value.strip())
            else:
                here = here[int(step)]
        elif isinstance(here, dict):
            if last:
                here[step] = _literal(value.strip())
            else:
                here = here.setdefault(step, {})
        else:
            raise BadInput(f"override {text!r}: {'.'.join(steps[:depth])!r} is no table; allowed: a table's key")


def _literal(text: str) -> Any:
    """A value as TOML writes it; what is none is a text without quotes, such as a path or a policy."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return table_from(value)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value
