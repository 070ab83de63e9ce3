"""Pre-tokenised text: a run of ids in a .npy or .bin file, mapped, cut into documents where one ends.

Where documents end says the file beside it, FILE.ends, which `kvx.train.data.tokenise` writes: an array of counts, as
.npy. Of other people's files, which have none, a token does; chats whose turns end with that token fall apart then.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from kvx.errors import BadInput

DTYPES = tuple(map(np.dtype, (np.uint16, np.uint32, np.int32, np.int64)))


BLOCK = 1 << 24
"""Ids that are looked at in one go."""


class TokenFile(Sequence[np.ndarray]):
    """Token ids as documents that each end with a token of their own.

    Args:
        tokens: of all documents, one after the other.
        end: the token that ends each; None: it is one document.
        ends: how many tokens there are up to the end of each; None: the token tells.
    """

    def __init__(
        self, tokens: Integer[np.ndarray, "N"], end: int | None, ends: Integer[np.ndarray, "documents"] | None = None
    ):
        self._tokens = tokens
        if ends is not None:
            self._ends = ends
            return
        found = np.zeros(0, np.int64) if end is None else np.flatnonzero(tokens == end) + 1
        # What follows the last end is a document too, cut short.
        cut = len(tokens) > (found[-1] if len(found) else 0)
        self._ends = np.append(found, len(tokens)) if cut else found

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Integer[np.ndarray, "N"]:
        start = self._ends[index - 1] if index else 0
        return np.asarray(self._tokens[start : self._ends[index]])


def ends_file(path: Path) -> Path:
    """Where the ends of a file's documents are kept."""
    return path.with_name(f"{path.name}.ends")


def open_tokens(path: Path, dtype: str, end: int | None, vocabulary: int | None = None) -> TokenFile:
    """The documents of a file.

    Args:
        dtype, vocabulary: as `map_tokens` has them.
        end: the token that ends a document, where no file beside it tells.

    Raises:
        BadInput: as `map_tokens`; ends that are not those of the file.
    """
    tokens, beside = map_tokens(path, dtype, vocabulary), ends_file(path)
    if not beside.exists():
        return TokenFile(tokens, end)
    try:
        ends = np.load(beside)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{beside} cannot be read as ends of documents: {str(error).splitlines()[0]}") from None
    rises = ends.ndim == 1 and ends.dtype == np.int64 and bool(np.all(np.diff(ends, prepend=0) > 0))
    if not rises or (int(ends[-1]) if len(ends) else 0) != len(tokens):
        raise BadInput(
            f"{beside} does not fit the {len(tokens)} tokens of {path.name}; allowed: what was written with it"
        )
    return TokenFile(tokens, end, ends)


def map_tokens(path: Path, dtype: str, vocabulary: int | None = None) -> Integer[np.ndarray, "N"]:
    """The ids of a file, mapped.

    Args:
        path: .npy, of uint16, uint32, int32 or int64; or .bin, ids in the machine's byte order and nothing else.
        dtype: of a .bin file.
        vocabulary: ids are below it, which one pass over the file makes sure of; None: they may be any.

    Raises:
        BadInput: a file that is damaged, or holds something else.
    """
    try:
        tokens = np.load(path, mmap_mode="r") if path.suffix.lower() == ".npy" else _raw(path, np.dtype(dtype))
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path} cannot be read as token ids: {str(error).splitlines()[0]}") from None
    if tokens.ndim != 1 or tokens.dtype not in DTYPES:
        raise BadInput(
            f"{path} is of shape {tokens.shape} and dtype {tokens.dtype}; allowed: one row of uint16s or uint32s"
        )
    if vocabulary is not None:
        _check_ids(path, tokens, vocabulary)
    return tokens


def _check_ids(path: Path, tokens: Integer[np.ndarray, "N"], vocabulary: int) -> None:
    for start in range(0, len(tokens), BLOCK):
        block = tokens[start : start + BLOCK]
        for worst in (int(block.min()), int(block.max())):
            if not 0 <= worst < vocabulary:
                raise BadInput(f"{path} has token id {worst}; allowed: 0 to {vocabulary - 1}, the vocabulary")


def _raw(path: Path, dtype: np.dtype) -> Integer[np.ndarray, "N"]:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise BadInput(f"{path} has {size} bytes; allowed: a multiple of {dtype.itemsize}, for {dtype}")
    return np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
