"""Prose to measure on: Python's own documentation by default, or a folder of the user's texts."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from kvx.errors import BadInput

LEAST = 20_000
"""Characters of prose that the workloads need at least."""

LARGEST = 50_000_000
"""Bytes that are read of a user's folder at most."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Prose:
    """Paragraphs of running text in a fixed order.

    Attributes:
        name: where they come from.
        text: everything, as it was read.
    """

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Of the text as it was read: what two runs must share to be comparable."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def paragraphs(self) -> tuple[str, ...]:
        """Paragraphs that are running text: tables, code and headings would measure something else."""
        found = (" ".join(block.split()) for block in re.split(r"\n\s*\n", self.text))
        return tuple(block for block in found if _is_prose(block))

    @property
    def haystack(self) -> tuple[str, ...]:
        """The first half, by characters: what facts are hidden in, and what policies are calibrated on."""
        return self.paragraphs[: self._middle]

    @property
    def held_out(self) -> tuple[str, ...]:
        """The second half: what perplexity is measured on."""
        return self.paragraphs[self._middle :]

    @property
    def _middle(self) -> int:
        total, so_far = sum(map(len, self.paragraphs)), 0
        for index, paragraph in enumerate(self.paragraphs):
            so_far += len(paragraph)
            if 2 * so_far >= total:
                return index + 1
        return 0


def prose(folder: Path | None = None) -> Prose:
    """The default prose, or that of the .txt and .md files of a folder, in the order of their names.

    Args:
        folder: None: `pydoc_data.topics`, which every CPython has; it differs between versions, hence the checksum.

    Raises:
        BadInput: not a folder, no such files in it, not UTF-8, too little running text, or too many bytes.
    """
    found = _python_topics() if folder is None else Prose(str(folder), _folder(folder))
    characters = sum(map(len, found.paragraphs))
    if characters < LEAST:
        raise BadInput(f"text={found.name!r} has {characters} characters of running text; allowed: at least {LEAST}")
    return found


def sentences(paragraphs: tuple[str, ...]) -> list[str]:
    """The sentences of some paragraphs."""
    return [sentence for paragraph in paragraphs for sentence in _SENTENCE.split(paragraph)]


def _python_topics() -> Prose:
    from pydoc_data.topics import topics

    return Prose("pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics)))


def _folder(folder: Path) -> str:
    if not folder.is_dir():
        raise BadInput(f"text={str(folder)!r} is not a folder; allowed: a folder with .txt or .md files")
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md") and path.is_file())
    if not files:
        raise BadInput(f"text={str(folder)!r} has no .txt or .md files; allowed: at least one")
    try:
        size = sum(path.stat().st_size for path in files)
        if size > LARGEST:
            raise BadInput(f"text={str(folder)!r} holds {size} bytes; allowed: at most {LARGEST}")
        return "\n\n".join(path.read_text(encoding="utf-8") for path in files)
    except UnicodeDecodeError:
        raise BadInput(f"text={str(folder)!r} has a file that is not UTF-8; allowed: UTF-8 text") from None
    except OSError as error:
        raise BadInput(f"text={str(folder)!r} cannot be read: {error.strerror or error}") from None


def _is_prose(block: str) -> bool:
    """Long enough to be a sentence, ends as one, and consists of words."""
    if len(block) < 80 or block[-1] not in ".!?":
        return False
    return sum(letter.isalpha() or letter in " ,.'" for letter in block) >= 0.92 * len(block)


def documents(tokenizer: Any, paragraphs: tuple[str, ...], count: int, length: int) -> Int[np.ndarray, "B T"]:
    """`count` documents of exactly `length` tokens, each from the start of its own part of the paragraphs.

    Raises:
        BadInput: too little text.
    """
    rows = []
    for part in np.array_split(np.arange(len(paragraphs)), count):
        text = "\n\n".join(paragraphs[index] for index in part)
        ids = tokenizer.encode(text)
        if len(ids) < length:
            raise BadInput(
                f"text has parts of {len(ids)} tokens when cut into {count} documents; allowed: at least {length} each"
            )
        rows.append(ids[:length])
    return np.asarray(rows, np.int32)
