"""Records from files that others wrote: JSON lines, gzipped or not, JSON lists and CSV; hostile until parsed."""

import csv
import gzip
import heapq
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kvx.errors import BadInput

LARGEST = 2**32
"""Bytes that are read of a file at most, once it is unpacked."""

LONGEST = 2**26
"""Bytes of a line at most: InfiniteBench's longest, a Chinese novel, has about a tenth of it."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """One record.

    Attributes:
        where: it stands: "file:12", or "file, record 12".
        table: its fields.
    """

    where: str
    table: Mapping[str, Any]

    def refusal(self, field: str, allowed: str) -> BadInput:
        """That a field is not as it should be."""
        if field not in self.table:
            return BadInput(f"{self.where} has the fields {sorted(self.table)}; allowed: one of them is {field!r}")
        value = self.table[field]
        shown = f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)[:80]
        return BadInput(f"{self.where}: {field!r} is {shown}; allowed: {allowed}")

    def text(self, field: str, default: str | None = None) -> str:
        """A field that is a text.

        Args:
            default: where the record does not have it; None: it must.

        Raises:
            BadInput: the field is missing, another type, or not valid Unicode.
        """
        value = self.table.get(field, default)
        if not isinstance(value, str) or not _encodable(value):
            raise self.refusal(field, "a text")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """A field that is a text or a number, or a list of such, as texts.

        Raises:
            BadInput: the field is missing, another type, or an empty list.
        """
        value = self.table.get(field)
        values = value if isinstance(value, list) else [value]
        number = all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in values)
        found = tuple(map(str, values))
        if not values or not number or not all(map(_encodable, found)):
            raise self.refusal(field, "a text or a number, or a list of at least one")
        return found


def file_of(path: str, names: Sequence[str]) -> Path:
    """The file that a task's option `path` stands for.

    Args:
        path: the file itself, or a folder.
        names: of the file in the folder; the first that exists.

    Raises:
        BadInput: nothing there.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        found = next((found / name for name in names if (found / name).is_file()), found / names[0])
    if not found.is_file():
        raise BadInput(f"path={path!r} holds no file {found.name!r}; allowed: a file, or a folder with {names[0]}")
    return found


def rows(path: Path) -> Iterator[Row]:
    """The records of a file: of .json those of its list, else one a line; ".gz" is unpacked; blank lines are skipped.

    Raises:
        BadInput: a file that cannot be read or unpacked, is too large, or has a line (or a list) that is not JSON of
            objects, with its number.
    """
    name = path.name.lower().removesuffix(".gz")
    number = 0
    try:
        with _opened(path) as file:
            if name.endswith(".json"):
                yield from _listed(path, file.read(LARGEST + 1))
                return
            for number, line in enumerate(_lines(path, file), 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield Row(where, _object(where, _parsed(where, line)))
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise BadInput(f"{path}:{number + 1} cannot be unpacked; allowed: a whole gzip file") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from None


def columns(path: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    """The rows of a CSV file without a heading, each with where it stands.

    Raises:
        BadInput: a file that cannot be read, is not UTF-8 or too large; a row of another number of columns.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise BadInput(f"{path} has {size} bytes; allowed: at most {LARGEST}")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if len(row) != count:
                    raise BadInput(f"{where} has {len(row)} columns; allowed: {count}")
                yield where, row
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 at byte {error.start}; allowed: CSV in UTF-8") from None
    except csv.Error as error:
        raise BadInput(f"{path} is not CSV ({error}); allowed: rows of {count} columns") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from None


def chosen(items: Iterable[Item], count: int, seed: int, shuffle: bool) -> list[Item]:
    """The first so many in their order, or those that a seed draws; the first of more are the same.

    Raises:
        BadInput: there are none.
    """
    random = np.random.default_rng(seed)
    found = heapq.nsmallest(count, items, lambda _: random.random()) if shuffle else list(islice(items, count))
    if not found:
        raise BadInput("the task's file holds no record that was asked for; allowed: at least one")
    return found


def _opened(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(path: Path, file: BufferedIOBase) -> Iterator[bytes]:
    total, number = 0, 0
    while line := file.readline(LONGEST + 1):
        total, number = total + len(line), number + 1
        if len(line) > LONGEST:
            raise BadInput(f"{path}:{number} is longer than {LONGEST} bytes; allowed: shorter lines")
        if total > LARGEST:
            raise BadInput(f"{path}:{number} is beyond {LARGEST} bytes; allowed: a smaller file")
        yield line


def _listed(path: Path, content: bytes) -> Iterator[Row]:
    if len(content) > LARGEST:
        raise BadInput(f"{path} is longer than {LARGEST} bytes; allowed: a smaller file")
    found = _parsed(str(path), content)
    if not isinstance(found, list):
        raise BadInput(f"{path} is a {type(found).__name__}; allowed: a list of objects")
    for number, each in enumerate(found, 1):
        where = f"{path}, record {number}"
        yield Row(where, _object(where, each))


def _parsed(where: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        raise BadInput(f"{where} is not UTF-8; allowed: JSON") from None
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{where} is not JSON ({error.msg} at line {error.lineno}, column {error.colno}); allowed: JSON"
        ) from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, lists in lists without end
        raise BadInput(f"{where} is not JSON that can be read; allowed: the published format") from None


def _object(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{where} is a {type(value).__name__}; allowed: an object")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        return False
    return True
