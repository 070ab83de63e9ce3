"""Documents from files, each by its number: text, messages of a chat, or token ids, as the file has them.

Text, JSONL and a column of Parquet are read into memory; Arrow and pre-tokenised files stay on disk and are mapped. A
corpus that does not fit into memory is tokenised once (`python -m kvx.train.data.tokenise`).
"""

import gzip
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from kvx.errors import BadInput
from kvx.prose import prose
from kvx.train.data.files import LINES, PYTHON_DOCS, TABLES, TOKENS, expand, suffix
from kvx.train.data.tables import Column, read_column
from kvx.train.data.token_file import TokenFile, open_tokens

Record = Any
"""A text, a list of messages, or a row of token ids."""


class Documents(Sequence[Record]):
    """The documents of several files as one sequence.

    Args:
        parts: of each file.
    """

    def __init__(self, parts: Sequence[Sequence[Record]]):
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def tokens(self) -> int | None:
        """How many ids all files hold; None: some hold text, which is not counted before it is read."""
        files = [part for part in self._parts if isinstance(part, TokenFile)]
        return sum(len(file.tokens) for file in files) if len(files) == len(self._parts) else None

    @property
    def first_chats(self) -> list[list[Any]]:
        """The first conversation of each file that has one; any line of JSONL may be the first."""
        found = (next((record for record in part if record and isinstance(record, list)), None) for part in self._chats)
        return [chat for chat in found if chat is not None]

    @property
    def _chats(self) -> Iterator[Sequence[Record]]:
        """Files with conversations, so far as their kind tells: a column of texts is not gone through."""
        for part in self._parts:
            if isinstance(part, list) or (isinstance(part, Column) and part.holds_lists):
                yield part

    def __getitem__(self, index: int) -> Record:
        which = bisect_right(self._ends, index)
        return self._parts[which][index - (self._ends[which - 1] if which else 0)]


def open_documents(
    paths: Sequence[str],
    name: str,
    *,
    field: str = "text",
    end: int | None = None,
    dtype: str = "uint16",
    vocabulary: int | None = None,
) -> Documents:
    """The documents of files and folders, in order.

    Args:
        paths: .txt, .md or .rst (a document each), .jsonl, .jsonl.gz, .parquet or .arrow (one a row), .npy or .bin
            (token ids, documents one after the other), folders of them, or Hugging Face datasets on disk; see `expand`.
        name: of the setting, for refusals.
        field: of a row: a text, or a list of messages.
        end: the token that ends a document in .npy and .bin that come without ends; None: each is one document.
        dtype: of .bin files.
        vocabulary: ids of .npy and .bin files are below it; None: they are not looked at.

    Raises:
        BadInput: a path that cannot be read; a broken line, by file and number; a field that is missing or of another
            type; messages that are none; ids outside the vocabulary; no text at all.
    """
    documents = Documents([_read(file, field, end, dtype, vocabulary) for file in expand(paths, name)])
    if not any(_filled(documents[index]) for index in range(len(documents))):
        raise BadInput(f"{name}={list(paths)!r} holds no text; allowed: at least one document that is not empty")
    return documents


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSONL file, gzipped or not; blank lines are skipped.

    Yields:
        Where the line is ("file:12"), and its value.

    Raises:
        BadInput: a file that cannot be read or unpacked, or a line that is not JSON, by its number.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except UnicodeDecodeError:
        raise BadInput(f"{path}:{number} is not UTF-8; allowed: one JSON object a line") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{number} is not JSON ({error.msg}); allowed: one JSON object a line") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise BadInput(f"{path}:{number + 1} cannot be unpacked; allowed: a whole gzip file") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from None


def field_of(where: str, row: Any, field: str) -> Record:
    """A row's text or messages.

    Raises:
        BadInput: a row without the field, or with something else in it.
    """
    if not isinstance(row, dict):
        raise BadInput(f"{where} is a {type(row).__name__}; allowed: an object with {field!r}")
    if field not in row:
        raise BadInput(f"{where} has the fields {sorted(row)}; allowed: one of them is {field!r}")
    value = row[field]
    if not isinstance(value, str | list):
        raise BadInput(f"{where}: {field!r} is a {type(value).__name__}; allowed: a text, or a list of messages")
    if isinstance(value, list):
        check_messages(value, f"{where}: ")
    return value


def check_messages(messages: list[Any], where: str = "") -> None:
    """Refuse what is no conversation.

    Args:
        where: it is from, for the refusal.

    Raises:
        BadInput: anything but objects with a role, which is a text, and content.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise BadInput(
                f"{where}messages hold {str(message)[:80]}, which is none; allowed: objects with role (a text) and "
                "content"
            )


def _read(path: Path, field: str, end: int | None, dtype: str, vocabulary: int | None) -> Sequence[Record]:
    if str(path) in PYTHON_DOCS:
        found = prose()
        halves: dict[str, tuple[str, ...]] = dict(zip(PYTHON_DOCS, (found.haystack, found.held_out), strict=True))
        return ["\n\n".join(halves[str(path)])]
    kind = suffix(path)
    if kind in LINES:
        return [field_of(where, row, field) for where, row in read_lines(path)]
    if kind in TABLES:
        return read_column(path, field)
    if kind in TOKENS:
        return open_tokens(path, dtype, end, vocabulary)
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 at byte {error.start}; allowed: text") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from None


def _filled(record: Record) -> bool:
    return bool(record.strip()) if isinstance(record, str) else len(record) > 0
