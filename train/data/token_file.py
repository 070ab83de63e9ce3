"""Pre-tokenised text: a run of ids in a .npy or .bin file, mapped, cut into documents where one ends.

Where documents end says the file beside it, FILE.ends, which `kvx.train.data.tokenise` writes: an array of counts, as
.npy. Of other people's files, which have none, a token does; chats whose turns end with that token fall apart then.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from kvx.errors import BadInput
from kvx.train.data.files import TOKENS, suffix

DTYPES = tuple(map(np.dtype, (np.uint16, np.uint32, np.int32, np.int64)))

BLOCK = 1 << 24
"""Ids that are looked at in one go."""


class TokenFile(Sequence[np.ndarray]):
    """Token ids as documents that each end with a token of their own.

    Args:
        tokens: of all documents, one after the other.
        end: the token that ends each; None: it is one document.
        ends: how many tokens there are up to the end of each; None: the token tells.

    Attributes:
        tokens: as given.
    """

    def __init__(
        self, tokens: Integer[np.ndarray, "N"], end: int | None, ends: Integer[np.ndarray, "documents"] | None = None
    ):
        self.tokens = tokens
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
        return np.asarray(self.tokens[start : self._ends[index]])


def ends_file(path: Path) -> Path:
    """Where the ends of a file's documents are kept."""
    return path.with_name(f"{path.name}.ends")


def open_tokens(path: Path, dtype: str, end: int | None, vocabulary: int | None = None) -> TokenFile:
    """The documents of a file, mapped.

    Args:
        path: .npy, of uint16, uint32, int32 or int64; or .bin, ids in the machine's byte order and nothing else.
        dtype: of a .bin file.
        end: the token that ends a document, where no file beside it tells.
        vocabulary: ids are below it, which one pass over the file makes sure of; None: they may be any.

    Raises:
        BadInput: a file of another kind, one that is damaged, or holds something else; ends that are not its own.
    """
    kind = suffix(path)
    if kind not in TOKENS:
        raise BadInput(f"{path} is no file of token ids; allowed: {' or '.join(TOKENS)}")
    try:
        tokens = np.load(path, mmap_mode="r") if kind == ".npy" else _raw(path, np.dtype(dtype))
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path} cannot be read as token ids: {str(error).splitlines()[0]}") from None
    if tokens.ndim != 1 or tokens.dtype not in DTYPES:
        raise BadInput(
            f"{path} is of shape {tokens.shape} and dtype {tokens.dtype}; allowed: one row of uint16s or uint32s"
        )
    # Ends first: ids that are read in a dtype that is not theirs may well be outside the vocabulary.
    ends = _ends(path, tokens)
    if vocabulary is not None:
        _check_ids(path, tokens, vocabulary)
    return TokenFile(tokens, end, ends)


def _ends(path: Path, tokens: Integer[np.ndarray, "N"]) -> Integer[np.ndarray, "documents"] | None:
    """What the file beside it tells; None: there is none."""
    beside = ends_file(path)
    if not beside.exists():
        return None
    try:
        ends = np.load(beside)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{beside} cannot be read as ends of documents: {str(error).splitlines()[0]}") from None
    rises = ends.ndim == 1 and ends.dtype == np.int64 and bool(np.all(np.diff(ends, prepend=0) > 0))
    if not rises or (int(ends[-1]) if len(ends) else 0) != len(tokens):
        raise BadInput(
            f"{beside} does not fit the {len(tokens)} tokens of {path.name}, read as {tokens.dtype}; allowed: what was "
            "written with it, in the dtype that it was written in"
        )
    return ends


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
